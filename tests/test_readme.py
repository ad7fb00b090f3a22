"""README.md and docs/ are true: map of the files, commands, links, presets, diff, every runnable block."""

import ast
import dataclasses
import functools
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from small_runs import assert_same, no_figures, weights  # noqa: F401 (a fixture)

import bench
import evaluate
import export
import lm
import replay
import train
from config.checks import check_config
from config.cli import load_preset, parse_flags
from data.beton import import_ffcv
from launch import snapshot, submit
from monitor.log import load_run

REPO = Path(__file__).parent.parent
README = REPO / "README.md"
WALK = REPO / "docs/walkthrough.md"  # its blocks are run, and it has the table of presets
BENCH = REPO / "docs/bench.md"  # commands as headings, and what they printed as blocks
PAGES = [README, *sorted(set((REPO / "docs").glob("*.md")) - {BENCH})]
MAP = "The files, in reading order"


# ---- what stands in a page


def get_blocks(text: str) -> list[tuple[str, int, list[str]]]:
    """(info string, number of its first line, lines) of each fenced block."""
    blocks, opened = [], None
    for number, line in enumerate(text.splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened = (line[3:].strip(), number + 1, [])
        elif line.startswith("```"):
            blocks.append(opened)
            opened = None
        elif opened:
            opened[2].append(line)
    assert opened is None, f"the block that begins in line {opened[1]} has no end"
    return blocks


def get_lines(text: str, *kinds: str) -> Iterator[tuple[int, str]]:
    """(number, line) of what is in blocks of these kinds, without empty ones. A line that ends with a
    backslash goes on in the next."""
    for info, first, lines in get_blocks(text):
        if info not in kinds:
            continue
        start, begun = first, ""
        for number, line in enumerate(lines, first):
            if not begun:
                start = number
            begun += line.removesuffix("\\")
            if not line.endswith("\\"):
                if begun.strip():
                    yield start, begun
                begun = ""


def get_prose(text: str) -> list[tuple[int, str]]:
    """(number, line) of what is in no block."""
    inside = set()
    for _, first, lines in get_blocks(text):
        inside.update(range(first - 1, first + len(lines) + 1))
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if number not in inside]


def get_spans(text: str) -> list[tuple[int, str]]:
    """(number, code) of each `code` in the prose."""
    return [(number, code) for number, line in get_prose(text) for code in re.findall(r"`([^`]+)`", line)]


def get_section(text: str, heading: str) -> str:
    """What stands under a heading of the second level, up to the next one."""
    return re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


# ---- README's size, and its map of the files


def test_readme_is_short():
    assert len(README.read_bytes()) <= 12_000, "what a newcomer can do without goes to docs/"


def get_map(text: str) -> tuple[set[str], set[str]]:
    """What the map names: files, and the folders whose line stands for all that is in them.

    In its list files are `code`. In its block a line at the margin is a file or a folder. Lines below a
    folder that are set in by two are files of that folder: every word.py in such a line, and every word.pbs.
    """
    section = get_section(text, MAP)
    files = {code for _, code in get_spans(section) if re.fullmatch(r"[\w/]+\.(py|pbs)", code)}
    folders, opened = {}, ""  # folder -> how many lines are below it
    for _, line in get_lines(section, "text"):
        first = line.split()[0]
        if line.startswith("  "):
            files.update(f"{opened}{name}" for name in re.findall(r"\w+\.(?:py|pbs)\b", line))
            folders[opened] += 1
        elif first.endswith("/"):
            opened = first
            folders[opened] = 0
        else:
            files.add(first)
    return files, {folder for folder, lines in folders.items() if lines == 0}


def is_preset(path: Path) -> bool:
    """Whether a file of config/ is a preset: assignments only, over what another preset assigned."""
    for node in ast.parse(path.read_text()).body:
        builds_on = isinstance(node, ast.ImportFrom) and node.module.startswith("config.")
        if not (builds_on or isinstance(node, ast.Assign)):
            return False
    return True


def get_map_problems(text: str, tracked: list[str]) -> list[str]:
    """What is wrong with the map, given the files that git tracks."""
    files, folders = get_map(text)
    must = {path for path in tracked if path.endswith(".py") and not path.endswith("__init__.py")}
    must = {path for path in must if not path.startswith(tuple(folders))}
    must = {path for path in must if not (path.startswith("config/") and is_preset(REPO / path))}
    problems = [f"not in the map: {path}" for path in sorted(must - files)]
    problems += [f"no such file: {path}" for path in sorted(files - set(tracked))]
    problems += [f"no such folder: {f}" for f in sorted(folders) if not any(p.startswith(f) for p in tracked)]
    return problems


def get_tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True)
    return [path for path in done.stdout.splitlines() if (REPO / path).exists()]


def test_the_map_names_every_file_and_no_other():
    text = README.read_text()
    assert get_map_problems(text, get_tracked()) == []
    first_five = re.findall(r"^(\d)\. `([\w/]+\.py)`", get_section(text, MAP), re.MULTILINE)
    assert [number for number, _ in first_five] == list("12345")


SMALL_MAP = f"""# Title
## {MAP}
1. `train.py`: the loop, which calls `step()`
```text
start.py    the start
config/     presets
  cli.py    flags
lora/
  ranks.py  ranks; inject.py: verbs; job.pbs: a script
tests/      tests of start.py
```
## Next
`other.py`
"""
SMALL_HOUSE = [
    "train.py",
    "start.py",
    "config/__init__.py",
    "config/debug.py",
    "config/cli.py",
    "lora/ranks.py",
]
SMALL_HOUSE += ["lora/inject.py", "lora/job.pbs", "tests/test_start.py", "README.md"]


def test_map_problems_are_found(monkeypatch, tmp_path):
    monkeypatch.setitem(globals(), "REPO", tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/debug.py").write_text("from config.base import *\nlr = 1e-3\n")
    (tmp_path / "config/cli.py").write_text("import ast\n")
    assert get_map_problems(SMALL_MAP, SMALL_HOUSE) == []
    for path in ("train.py", "start.py", "config/cli.py", "lora/inject.py", "lora/job.pbs"):
        house = [other for other in SMALL_HOUSE if other != path]
        assert get_map_problems(SMALL_MAP, house) == [f"no such file: {path}"]
    for path in ("nope.py", "lora/nope.py", "other.py", "launch/nope.py"):
        assert get_map_problems(SMALL_MAP, [*SMALL_HOUSE, path]) == [f"not in the map: {path}"]
    assert get_map_problems(SMALL_MAP, SMALL_HOUSE[:-2]) == ["no such folder: tests/"]
    (tmp_path / "config/debug.py").write_text("lr = 1e-3\n\n\ndef get_lr():\n    return lr\n")
    assert get_map_problems(SMALL_MAP, SMALL_HOUSE) == ["not in the map: config/debug.py"]


# ---- commands, files, links


def get_commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """(number, words) of each command of this repository's that a page shows, in a block or in the prose."""
    for number, line in [*get_lines(text, "", "bash run"), *get_spans(text)]:
        if not re.search(r"\b(python3?|torchrun) |^make ", line) or line.startswith("#"):
            continue
        for command in re.split(r"&&|;", line.split("  #")[0]):
            words = [word for word in shlex.split(command, comments=True) if word not in ("…", "--help")]
            starts = [i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"]
            if "make" in words[:1]:
                yield number, words
            elif starts:
                yield number, words[starts[0] :]


def get_parser_flags(path: Path) -> set[str]:
    """Flags of an argparse parser, by its source."""
    return set(re.findall(r'add_argument\(\s*"(--\w+)"', path.read_text()))


def get_bench_flags() -> dict[str, set[str]]:
    """Flags of each of bench.py's subcommands."""
    flags = {}
    for name, function in bench.COMMANDS.items():
        arguments = inspect.signature(function).parameters
        flags[name] = {f"--{argument}" for argument in arguments} | {
            f"--no_{argument}" for argument in arguments
        }
    return flags


def check_flags(words: list[str], known) -> None:
    for word in words:
        if word.startswith("--") and word.split("=")[0] not in known:
            raise ValueError(f"unknown flag {word}")


def check_train(words: list[str]) -> None:
    """A command line of train.py's, as far as no run has to be there. Raises ValueError."""
    defaults, flags = train.Config(), words
    if words and not words[0].startswith("-"):
        defaults, flags = load_preset(train.Config, REPO / words[0]), words[1:]
    check_config(parse_flags(flags, defaults))


def check_submit(words: list[str]) -> None:
    launch, presets, flags = submit.split_argv(words)
    parse_flags(launch, submit.Launch())
    for preset in presets or [submit.PAPER]:
        check_train([preset, *flags])


def check_with(default) -> Callable[[list[str]], None]:
    """A check of the command line of a program whose settings are the dataclass of `default`."""

    def check(words: list[str]) -> None:
        flags = words[1:] if words and not words[0].startswith("-") else words
        parse_flags(flags, default)

    return check


def check_lm(words: list[str]) -> None:
    """A command line of lm.py's, which hands --replay and --study on."""
    if words[:1] == ["--replay"]:
        CHECKS["replay.py"](words[1:])
    elif words[:1] == ["--study"]:
        check_flags(words[1:], ["--report"])
    else:
        lm.check_config(parse_flags(words, lm.Config()))


CHECKS = {
    "train.py": check_train,
    "lm.py": check_lm,
    "launch/job.py": check_train,
    "launch/submit.py": check_submit,
    "replay.py": check_with(replay.Replay()),
    "evaluate.py": check_with(evaluate.Evaluation()),
    "export.py": check_with(export.Export()),
    "bench.py": lambda words: check_flags(words[1:], get_bench_flags()[words[0]]),
    "study.py": lambda words: check_flags(words, ["--report"]),
}
MODULES = ("monitor.plot", "data.beton", "data.folder", "benchmarks.gpu_reference")


def check_command(words: list[str]) -> None:
    """Raises ValueError, KeyError or OSError for what wouldn't be accepted."""
    if words[0] == "make":
        targets = re.findall(r"^(\w[\w-]*):", (REPO / "Makefile").read_text(), re.MULTILINE)
        if unknown := [word for word in words[1:] if "=" not in word and word not in targets]:
            raise ValueError(f"no target {unknown[0]}")
    elif words[0] == "-m" and words[1] in MODULES:
        check_flags(words[2:], get_parser_flags(REPO / f"{words[1].replace('.', '/')}.py"))
    elif words[:2] != ["-m", "venv"]:
        CHECKS[words[0]](words[1:])


def get_anchors(path: Path) -> set[str]:
    """GitHub's anchors of a file's headings."""
    lines = [line for _, line in get_prose(path.read_text()) if re.match("#+ ", line)]
    headings = [line.lstrip("#").strip().lower() for line in lines]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@functools.cache
def get_known_flags() -> set[str]:
    kinds = (train.Config, lm.Config, submit.Launch, replay.Replay, evaluate.Evaluation, export.Export)
    known = {"--ttest", "--help"}
    for kind in kinds:
        known.update(f"--{field.name}" for field in dataclasses.fields(kind))
    for flags in get_bench_flags().values():
        known.update(flags)
    for name in MODULES:
        known.update(get_parser_flags(REPO / f"{name.replace('.', '/')}.py"))
    return known


def get_link_problem(target: str, page: Path) -> str | None:
    path, _, anchor = target.partition("#")
    linked = page.parent / path if path else page
    if re.match(r"\w+:", target):  # https: and the like
        return None
    if not linked.exists():
        return f"no file {path}"
    if anchor and anchor not in get_anchors(linked):
        return f"no heading {target}"
    return None


def get_problems(text: str, page: Path = README) -> list[str]:
    """What a page's text says that isn't so: ["12: …", …]."""
    problems = []
    for number, words in get_commands(text):
        try:
            check_command(words)
        except (ValueError, KeyError, OSError) as e:
            problems.append(f"{number}: {shlex.join(words)}: {e}")
    for number, code in get_spans(text):
        if code.startswith("--") and code.split()[0].split("=")[0] not in get_known_flags():
            problems.append(f"{number}: unknown flag {code}")
        is_file = re.fullmatch(r"[\w./-]+\.(py|md|txt|pbs)", code)
        if is_file and not any((REPO / folder / code).exists() for folder in ("", "config")):
            problems.append(f"{number}: no file {code}")
    for number, line in get_prose(text):
        for target in re.findall(r"\]\(([^)]+)\)", line):
            if problem := get_link_problem(target, page):
                problems.append(f"{number}: {problem}")
    return problems


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_files_and_links(page):
    assert get_problems(page.read_text(), page) == []


def test_commands_of_bench_md():
    headings = re.findall(r"^## python (bench.py .*)$", BENCH.read_text(), re.MULTILINE)
    assert len(headings) >= 5
    for heading in headings:
        check_command(heading.split())


def test_they_were_found():
    commands, links = set(), 0
    for page in PAGES:
        commands.update(words[0] for _, words in get_commands(page.read_text()))
        links += len(re.findall(r"\]\((?!\w+:)", page.read_text()))
    assert commands >= CHECKS.keys() - {"study.py"} | {"make", "-m"}
    assert links >= 20


# fmt: off
@pytest.mark.parametrize("text, says", [
    ("```\npython train.py config/debug.py --lrr 1\n```", "2: train.py config/debug.py --lrr 1: unknown"),
    ("```bash run\npython train.py config/none.py\n```", "no such preset"),
    ("```\npython train.py config/debug.py --tau high\n```", "high"),
    ("```\npython train.py config/debug.py --switch_epoch 99\n```", "is not before the last epoch"),
    ("```\necho && .venv/bin/python nope.py\n```", "nope.py"),
    ("so: `torchrun --nproc_per_node 4 train.py config/none.py`", "no such preset"),
    ("```\nsrun python launch/job.py --lrr 1\n```", "unknown flag --lrr"),
    ("```\npython launch/submit.py --node 2 config/smoke.py\n```", "unknown flag --node"),
    ("```\npython launch/submit.py config/smoke.py --switch_epoch 99\n```", "is not before the last epoch"),
    ("```\npython replay.py RUN --taus 1 2\n```", "unknown flag --taus"),
    ("```\npython evaluate.py RUN --merge True\n```", "unknown flag --merge"),
    ("```\npython export.py RUN --format onnx --out x\n```", "onnx"),
    ("```\npython bench.py wire --nope 1\n```", "unknown flag --nope"),
    ("```\npython bench.py nope\n```", "nope"),
    ("```\npython study.py --nope\n```", "unknown flag --nope"),
    ("```\npython -m data.beton a b.beton --modus raw\n```", "unknown flag --modus"),
    ("```\npython -m data.nope a\n```", "-m"),
    ("say `make nope`", "no target nope"),
    ("with `--nope 1`", "unknown flag --nope"),
    ("see `model/nope.py`", "no file model/nope.py"),
    ("see [there](docs/nope.md)", "no file docs/nope.md"),
    ("![figure](docs/nope.png)", "no file docs/nope.png"),
    ("see [below](#nope)", "no heading #nope"),
    ("see [there](docs/study.md#nope)", "no heading docs/study.md#nope"),
])
# fmt: on
def test_problems_are_found(text, says):
    problems = get_problems(text)
    assert len(problems) == 1 and says in problems[0]


def test_links_are_relative_to_their_page():
    text = "see [this](study.md#figures), [that](../README.md#limits) and [here](#figures)"
    assert get_problems(text, REPO / "docs/study.md") == []
    assert get_problems(text) == ["1: no file study.md", "1: no file ../README.md", "1: no heading #figures"]


def get_presets(text: str) -> tuple[set[str], list[str]]:
    """Files of the table of presets, a * resolved, and those it names in vain."""
    rows = re.findall(r"^\| (`.*?) \|", get_section(text, "Presets"), re.MULTILINE)
    files, missing = set(), []
    for name in re.findall("`(.+?)`", " ".join(rows)):
        found = [f"config/{path.name}" for path in (REPO / "config").glob(name.removeprefix("config/"))]
        files.update(found)
        if not found:
            missing.append(name)
    return files, missing


def test_every_preset_is_in_the_table_and_every_row_is_there():
    text = WALK.read_text()
    paths = [path for path in (REPO / "config").glob("[!_]*.py") if is_preset(path)]
    files = {f"config/{path.name}" for path in paths}
    assert len(files) > 10 and get_presets(text) == (files, [])
    row = re.search(r"^\| `config/smoke.py`.*\n", text, re.MULTILINE)[0]
    assert get_presets(text.replace(row, ""))[0] == files - {"config/smoke.py"}
    assert get_presets(text.replace(row, row + "| `config/nope.py` | |\n"))[1] == ["config/nope.py"]


# ---- README's diff


def load_patched(root: Path, diff: str):
    """train.py of the snapshot `root` as a module, with `diff` applied."""
    done = subprocess.run(["git", "apply", "-"], input=diff, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("patched_train", root / "train.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("no_figures")
def test_the_diff_is_a_variant(small, tmp_path, monkeypatch, capsys):
    """A few lines. Without its flag it trains as before, to the bit; with it on the loss that torch knows."""
    (lines,) = [lines for info, _, lines in get_blocks(README.read_text()) if info == "diff"]
    diff = "\n".join([*lines, ""])
    assert len(re.findall(r"^[+-](?![+-]{2} )", diff, re.MULTILINE)) <= 5
    snapshot.take_snapshot(tmp_path / "code")
    subprocess.run(["git", "init", "-q", tmp_path / "code"], check=True)  # or git looks further up
    patched = load_patched(tmp_path / "code", diff)

    def get_argv(name: str, *more: str) -> list[str]:
        flags = "--loader folder --num_workers 0 --train_samples 200 --batch_size 50 --compile False"
        flags += " --epochs 2 --max_steps 4 --lr_warmup_steps 1 --lr 1e-2"
        flags += f" --data_dir {small} --run_dir {tmp_path / name}"
        return [str(REPO / "config/debug.py"), *flags.split(), *more]

    def run(name: str, module, *more: str) -> list[float]:
        assert module.main(get_argv(name, *more)) == 0
        return load_run(tmp_path / name)[1][0]["step_losses"]

    before, off = run("before", train), run("off", patched)
    on = run("on", patched, "--label_smoothing", "0.5")
    monkeypatch.setattr(F, "cross_entropy", functools.partial(F.cross_entropy, label_smoothing=0.5))
    reference = run("reference", train)
    assert max(abs(a - b) for a, b in zip(on, reference, strict=True)) < 1e-3
    assert max(abs(a - b) for a, b in zip(on, off, strict=True)) > 5e-3
    assert off == before
    assert_same(weights(tmp_path / "off"), weights(tmp_path / "before"))
    capsys.readouterr()
    assert patched.main(get_argv("range", "--label_smoothing", "1.5")) == 2
    assert "label_smoothing must be in [0, 1), not 1.5" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="patch does not apply"):
        load_patched(tmp_path / "code", diff)  # twice


# ---- the Makefile


def dry_run(*words: str) -> str:
    """What make would do if nothing was there yet."""
    env = {name: value for name, value in os.environ.items() if name not in ("TORCH", "MAKEFLAGS")}
    command = ["make", "--dry-run", "--always-make", "LOADER=folder", *words]
    return subprocess.run(command, cwd=REPO, env=env, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_with_another_torch():
    """TORCH has an environment of its own, without the two pins that it replaces; all else is the same."""
    plain, other = dry_run("test"), dry_run("test", "TORCH=2.11.0")
    assert "torch==" not in plain and "pip install -r requirements.txt\n" in plain
    (install,) = re.findall(r".*pip install .*requirements\.txt$", other, re.MULTILINE)
    assert install.endswith("pip install torch==2.11.0 torchvision -r .venv-2.11.0/requirements.txt")
    assert not re.search(r"\.venv/", other) and not re.search(r"\.venv-", plain)
    pins = re.search(r"(grep .*) > \.venv-2\.11\.0/requirements\.txt", other)[1]
    left = subprocess.run(pins.split(), cwd=REPO, check=True, capture_output=True, text=True).stdout
    asked = (REPO / "requirements.txt").read_text().splitlines()
    assert left.splitlines() == [line for line in asked if not line.startswith(("torch==", "torchvision=="))]
    assert len(left.splitlines()) == len(asked) - 2
    get_tests = lambda said: [line.split("-m pytest")[1] for line in said.splitlines() if "-m pytest" in line]
    assert get_tests(plain) == get_tests(other) != []


# ---- the runnable blocks


def run_blocks(text: str, root: Path, timeout: float = 240) -> int:
    """Run every line of the runnable blocks by bash in `root`, in order; the first that fails ends the test.
    Prints how long each took, returns their number."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    env |= {"PATH": f"{root / '.venv/bin'}{os.pathsep}{env['PATH']}", "HF_HUB_OFFLINE": "1"}
    lines = list(get_lines(text, "bash run"))
    for number, line in lines:
        start = time.perf_counter()
        process = subprocess.Popen(
            ["bash", "-e", "-c", line],
            cwd=root,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, status = process.communicate(timeout=timeout)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, status = process.communicate()[0], f"none after {timeout} s"
        finally:
            if process.poll() is None:  # Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
        if status != 0:
            raise AssertionError(f"line {number}: {line}\nstatus {status}\n{output[-5000:]}")
        print(f"{time.perf_counter() - start:5.1f} s  {line}")
    return len(lines)


def test_a_line_that_fails_is_named(tmp_path):
    text = (
        "```\nfalse\n```\n```bash run\ntouch one\ntest -f one; echo said; false | true\n```\n\n"
        "```bash run\n\nls \\\n  two; touch three\ntouch four\n```\n"
    )
    says = r"line 11: ls   two; touch three\nstatus 2\n.*two.*No such file"
    with pytest.raises(AssertionError, match=says):
        run_blocks(text, tmp_path)
    assert os.listdir(tmp_path) == ["one"]
    with pytest.raises(AssertionError, match=r"line 2: sleep 60\nstatus none after 0.2 s"):
        run_blocks("```bash run\nsleep 60\n```", tmp_path, timeout=0.2)


def write_photos(root: Path, classes: int) -> None:
    """A tree of JPEGs of many sizes for the walkthrough's own images: waves, whose length is the class's."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(230, 400, 2)
                y, x = np.mgrid[:height, :width] / (5 + 8 * label) + rng.uniform(0, 6, (2, 1, 1))
                blue = np.full((height, width), 40.0)
                image = np.stack([128 + 100 * np.sin(x), 128 + 100 * np.cos(y), blue], axis=2)
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.jpg")


def test_each_of_the_five_things_can_be_run():
    """Each has a block that the next test runs."""
    text = WALK.read_text()
    headings = [line[3:] for _, line in get_prose(text) if re.match(r"## \d\. ", line)]
    assert [heading[0] for heading in headings] == list("12345")
    assert all("```bash run\n" in get_section(text, heading) for heading in headings)


@pytest.mark.slow
def test_a_newcomers_road(tmp_path):
    """Every runnable block, in order, in a clean checkout with an environment and Fashion-MNIST, as they are
    after `make train`."""
    data = REPO / "datasets/fashion_mnist"
    try:
        import_ffcv()
    except RuntimeError as e:
        pytest.skip(str(e))
    if not (data / "val.beton").exists():
        pytest.skip("no Fashion-MNIST here: make data")
    text, root = WALK.read_text(), tmp_path / "checkout"
    snapshot.take_snapshot(root)
    subprocess.run(["git", "init", "-q", root], check=True)
    (root / ".venv").symlink_to(sys.prefix)
    (root / "datasets").mkdir()
    (root / "datasets/fashion_mnist").symlink_to(data.resolve())
    classes = int(re.search(r"--data_dir datasets/photos --num_classes (\d+)", text)[1])
    write_photos(root / "datasets/photos", classes)
    assert run_blocks(text, root) >= 10
    phases = [e["phase"] for e in load_run(root / "runs/small")[1]]
    # what is exported has adapters, and the replay can be compared
    assert list(dict.fromkeys(phases)) == ["full", "warmup", "lora"]
