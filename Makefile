# make train   set up, prepare Fashion-MNIST, run config/debug.py through its three phases, draw the figures
# make test    set up, run the tests; make test-slow: those that take minutes
# make lint    the layout of the code and what a linter finds: ruff
# make study   does a switch pay? Experiments and controls on Fashion-MNIST, under three hours on 2 cores (with FFCV): docs/study.md
# make lm      set up without Fashion-MNIST and FFCV, train a byte-level GPT through the three phases: docs/lm.md
# make slurm   install Slurm (Debian's), on which the tests then start a cluster of their own
# LOADER=folder does without FFCV, its system libraries and root; PYTHON=python3.12 picks the interpreter;
# TORCH=2.11.0 is another torch than requirements.txt's, in an environment of its own: 2.11 to 2.14 are supported

PYTHON ?= python3
LOADER ?= ffcv
VENV := .venv$(if $(TORCH),-$(TORCH))
DATA := datasets/fashion_mnist
RAW := $(DATA)/FashionMNIST/raw/t10k-labels-idx1-ubyte
PY := $(VENV)/bin/python
# two at a time, one thread each: most tests wait for processes of their own, and two OpenMP pools on two cores spin against each other
TEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
LIBRARIES := python3-venv python3-dev g++ pkg-config libopencv-dev libturbojpeg0-dev

.PHONY: setup data train study lm slurm lint test test-slow
.DELETE_ON_ERROR:

setup: $(VENV)/.requirements $(if $(filter ffcv,$(LOADER)),$(VENV)/.ffcv)

# Asks for root only if a library is missing. Fashion-MNIST comes with Debian; elsewhere torchvision downloads it later.
$(VENV)/.libraries:
	@missing=$$(for p in $(LIBRARIES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		command -v apt-get >/dev/null || { echo "error: FFCV needs $(LIBRARIES); without apt-get use: make $(MAKECMDGOALS) LOADER=folder" >&2; exit 1; }; \
		$(SUDO) apt-get update && $(SUDO) apt-get install -y --no-install-recommends $$missing; \
	fi
	@dpkg -s dataset-fashion-mnist >/dev/null 2>&1 || $(SUDO) apt-get install -y --no-install-recommends dataset-fashion-mnist || \
		echo "no package dataset-fashion-mnist here: torchvision will download the data"
	@mkdir -p $(VENV) && touch $@

# pip finds the torchvision that goes with TORCH
REQUIRED := $(if $(TORCH),torch==$(TORCH) torchvision -r $(VENV)/requirements.txt,-r requirements.txt)

$(VENV)/.requirements: requirements.txt $(if $(filter ffcv,$(LOADER)),$(VENV)/.libraries)
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),grep -v ^torch requirements.txt > $(VENV)/requirements.txt)
	$(PY) -m pip install $(REQUIRED)
	@touch $@

# its other declared dependencies serve benchmarks, webdataset and cupy only
$(VENV)/.ffcv: $(VENV)/.requirements
	$(PY) -m pip install --no-deps --use-pep517 ffcv==1.0.2
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.requirements
	$(PY) -m pip install -r requirements-dev.txt
	@touch $@

data: $(if $(filter ffcv,$(LOADER)),$(DATA)/train.beton $(DATA)/val.beton,$(RAW))

$(RAW): | setup  # the last of its four files to be written
	$(PY) -m data.folder fashion_mnist $(DATA)

$(DATA)/%.beton: | $(RAW)
	$(PY) -m data.beton fashion_mnist:$* $@ --root $(DATA)

train: setup data
	$(PY) train.py config/debug.py --loader $(LOADER) --resume True
	$(PY) -m monitor.plot runs/debug

study: setup data
	$(PY) study.py

# it needs neither FFCV nor images
lm:
	$(MAKE) setup LOADER=folder
	$(PY) lm.py
	$(PY) -m monitor.plot runs/lm

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

test: setup data $(VENV)/.dev
	$(TEST) -m "not slow"

test-slow: setup data $(VENV)/.dev
	$(TEST) -m slow

# nothing is configured or started: each test run has its own daemons, keys and ports
slurm:
	@missing=$$(for p in slurm-wlm munge; do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then $(SUDO) apt-get update && $(SUDO) apt-get install -y --no-install-recommends $$missing; fi
