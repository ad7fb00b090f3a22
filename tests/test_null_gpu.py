"""train.py's path for CUDA on a GPU that computes nothing (tests/null_gpu): when the host waits for it, what
is compiled for it, what it holds. No result of it is a number.

`pytest -s -m slow tests/test_null_gpu.py` prints what is measured and not asserted: the host's time of a
step, and how far the simulation of bench.py memory is from the allocator.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import events

from benchmarks.choices import get_ranks
from benchmarks.memory import simulate_peaks
from tests.null_gpu.build import NoNullGPU, build, get_environment, run
from train import Config

REPO = Path(__file__).parent.parent
# 6 steps an epoch, everything random is on
RUN = (
    "--loader synthetic --train_samples 120 --batch_size 20 --epochs 6 --dtype bfloat16 --lr_warmup_steps 1 "
    "--dropout 0.1 --drop_path 0.1 --mixup 0.2 --cutmix 1 --random_erasing 0.25"
).split()
# full 1-2, warmup 3-4, lora 5-6
SWITCH = "--num_windows 2 --window_epochs 1 --switch_epoch 2 --lora_warmup_epochs 2".split()
PHASES = ("full", "warmup", "lora")
ADAPTERS = ("effective_weight_kernel", "adapter_gradients_kernel")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def null_gpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("null_gpu")
    try:
        build(folder)
    except NoNullGPU as error:
        pytest.skip(f"no null GPU: {error}")
    return folder


def run_script(folder: Path, sm: int, name: str, *flags) -> subprocess.CompletedProcess:
    """A script of tests/null_gpu, on the null GPU."""
    command = [sys.executable, "-m", f"tests.null_gpu.{name}", *map(str, flags)]
    return run(command, folder, sm, cwd=REPO, capture_output=True, text=True)


def get_kernels(folder: Path, sm: int) -> dict[str, int]:
    """The kernels that Triton compiled in runs on this GPU: name -> compute capability, as it noted it."""
    kernels = {}
    for cubin in Path(get_environment(folder, sm)["TRITON_CACHE_DIR"]).rglob("*.cubin"):
        kernels[cubin.stem] = json.loads(cubin.with_suffix(".json").read_text())["target"]["arch"]
    return kernels


# ---- the device itself


def test_it_passes_for_a_gpu_but_computes_nothing(null_gpu):
    code = """
import torch
from tests.null_gpu.counts import get_counts
x = torch.ones(64, 64, device="cuda", requires_grad=True)
kernels, waits = get_counts().kernels, get_counts().waits
(x @ x).sum().backward()
assert get_counts().kernels > kernels and get_counts().waits == waits
assert x.grad.sum().item() == 0 and get_counts().waits > waits
assert torch.ones(3).pin_memory().is_pinned() and torch.equal(torch.ones(3).cuda().cpu(), torch.zeros(3))
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
try:
    torch.empty(80 << 30, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("full")
"""
    for sm, name in ((80, "NVIDIA A100-SXM4-40GB (8, 0)"), (90, "NVIDIA H100 80GB HBM3 (9, 0)")):
        done = run([sys.executable, "-c", code], null_gpu, sm, cwd=REPO, capture_output=True, text=True)
        assert done.stdout.splitlines() == [name, "full"], done.stderr


def test_what_it_lacks_it_refuses_by_name(null_gpu):
    code = "import torch; torch.cuda.graph(torch.cuda.CUDAGraph()).__enter__()"
    done = run([sys.executable, "-c", code], null_gpu, 80, capture_output=True, text=True)
    assert done.returncode == 1 and "the null GPU has no cudaStreamBeginCapture" in done.stderr


def test_without_gcc_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoNullGPU, match="no gcc and no nm"):
        build(tmp_path / "null_gpu")
    with pytest.raises(NoNullGPU, match="built without CUDA"):
        build(tmp_path / "null_gpu", tmp_path)


# ---- a run


def test_three_phases_compiled_without_a_wait_between_looks(null_gpu, tmp_path):
    done = run_script(null_gpu, 80, "watched_run", *RUN, *SWITCH, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    watched, waits = map(int, re.search(r"watched steps: (\d+), waits: (\d+)", done.stdout).groups())
    assert watched > 20 and waits == 0
    phases = events(tmp_path / "run", "start", "switch")
    assert [p["graphs_compiled"] for p in phases] == [1, 1, 2]
    assert [p["eval_graphs_compiled"] for p in phases] == [1, 1, 1]
    ranks = json.loads((tmp_path / "run/ranks.json").read_text())
    assert len({rank for layers in ranks.values() for rank in layers}) > 2  # or 1, 1, 2 would say little
    assert all(epoch["peak_memory_bytes"] > 0 for epoch in events(tmp_path / "run", "epoch"))
    kernels = get_kernels(null_gpu, 80)
    print(f"\n{len(kernels)} kernels compiled for sm_80")
    assert set(kernels.values()) == {80}
    for part in ("native_layer_norm", "gelu_backward", *ADAPTERS):
        assert [name for name in kernels if part in name]


def test_control_a_wait_in_the_step_is_caught(null_gpu, tmp_path):
    flags = [*RUN, "--compile", False, "--max_steps", 6, "--run_dir"]  # the first epoch
    done = run_script(null_gpu, 80, "watched_run", *flags, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = run_script(null_gpu, 80, "watched_run", "--plant_item", *flags, tmp_path / "planted")
    assert done.returncode == 1 and "called a synchronizing CUDA operation" in done.stderr


def test_the_lora_phase_compiles_for_sm_90(null_gpu, tmp_path):
    flags = [*RUN, "--mode", "lora", "--max_steps", 6, "--run_dir", tmp_path / "run"]
    done = run_script(null_gpu, 90, "watched_run", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    (start,) = events(tmp_path / "run", "start")
    assert start["device"] == "cuda" and start["graphs_compiled"] == 1  # the patches' embedding is trained
    kernels = get_kernels(null_gpu, 90)
    assert set(kernels.values()) == {90}
    for part in ADAPTERS:
        assert [name for name in kernels if part in name]


# ---- memory, and the host's time


def test_the_allocators_peaks_are_the_simulated_ones(null_gpu):
    flags = ["--model", "L/16", "--images", 64, "--world_size", 2, "--dp_shard", 1, "--steps", 1]
    done = run_script(null_gpu, 80, "steps", *flags)
    assert done.returncode == 0, done.stderr
    cfg = Config(model="L/16", dataset="imagenet", batch_size=64)
    measured, simulated = json.loads(done.stdout), simulate_peaks(cfg, get_ranks("mixed", "L/16"))
    print("\nViT-L/16, 64 images, a copy on each process, eagerly: GiB at a step's peak")
    for phase in PHASES:
        peak, expected = measured[phase]["peak"], simulated[phase]
        percent = 100 * (peak / expected - 1)
        print(f"{phase:8}{peak / 2**30:7.2f}, simulated {expected / 2**30:6.2f} ({percent:+.1f} %)")
        assert abs(percent) < 5
    # Control: the phases are further apart than the tolerance, so it can tell them from each other.
    assert simulated["lora"] < 0.95 * simulated["warmup"]


def test_host_time_of_a_compiled_step(null_gpu):
    """Prints, and asserts only that all three phases get there in an A100's memory."""
    done = run_script(null_gpu, 80, "steps", "--model", "L/16", "--images", 64, "--compile", "--steps", 15)
    assert done.returncode == 0, done.stderr
    print("\nViT-L/16, 64 images, one process, compiled: the host's ms of a step, GiB at its peak")
    for phase, row in json.loads(done.stdout).items():
        times = f"median {row['milliseconds']:6.1f}, least {row['least_milliseconds']:6.1f}"
        print(f"{phase:8}{times}{row['peak'] / 2**30:8.2f}")
        assert 0 < row["peak"] < 40 * 2**30


# ---- bench.py gpu


def test_rehearsal_of_bench_gpu(null_gpu, tmp_path):
    """Parts that a GPU is needed for, at their dry run's sizes: they come to their end. Where all numbers are
    zero, part 1 says of every operator that it is wrong, and part 4 of the profile that it has no kernels."""
    done = run_script(null_gpu, 80, "rehearse", tmp_path, 0, 1, 3, 4)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    statuses = {number: outcome["status"] for number, outcome in outcomes.items()}
    log = (tmp_path / "log.txt").read_text()
    assert statuses == {"0": "passed", "1": "failed", "3": "passed", "4": "failed"}, log
    operators = [row for row in outcomes["1"]["rows"] if row["what"].endswith("error")]
    assert len(operators) >= 6 + 4 + 4 and not any(row["holds"] for row in operators)
    failed = [row["what"] for row in outcomes["4"]["rows"] if row["holds"] is False]
    assert failed == [f"{phase}: a step's kernels" for phase in PHASES]
    for phase in PHASES:
        peak = outcomes["3"]["figures"][f"{phase}_peak_bytes"]
        # at this size most of it is a library's workspace
        assert 0 < outcomes["3"]["figures"][f"{phase}_simulated_peak_bytes"] < peak
