"""README.md is true: its table of flags, its commands, links and presets, its diff, and every block that it calls runnable.

    python tests/test_readme.py     writes the table of flags anew, between its marks
"""

import dataclasses
import functools
import importlib.util
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))  # for this file as a script

import bench
import evaluate
import export
import replay
import train
from data.import_ffcv import import_ffcv
from errors import UserError
from launch import submit
from monitor.log import load_run
from test_train import assert_same, no_figures, weights  # noqa: F401 (a fixture)

README = REPO / "README.md"
MARKS = ("<!-- flags -->", "<!-- /flags -->")


# ---- the table of flags

def build_table(config, source):
    """A table of the dataclass's fields: name, default (in brackets what else there is), the comment beside it in `source`."""
    hints, rows, code = typing.get_type_hints(config), [], lambda value: f"`{value}`"
    fields = {f.name: f for f in dataclasses.fields(config)}
    for line in source.splitlines():
        group, field = re.fullmatch(r"    # (.+)", line), re.fullmatch(r"    (\w+): [^#]+?  # (.+)", line)
        if group:
            rows.append(f"| **{group[1]}** | | |")
        elif field and (f := fields.pop(field[1], None)):
            default = " ".join(f.default) if isinstance(f.default, tuple) else f.default
            others = [code(value) for value in typing.get_args(hints[f.name]) if value != f.default]
            others = f" ({', '.join(others)})" if typing.get_origin(hints[f.name]) is typing.Literal else ""
            rows.append(f"| `--{f.name}` | {code(default)}{others} | {field[2]} |")
    if fields:
        raise ValueError(f"no comment beside {', '.join(fields)}")
    return "\n".join(["| flag | default | |", "|---|---|---|", *rows])


def put_table(text, config=train.Config):
    """README's text with the table as it should be."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{build_table(config, inspect.getsource(train.Config))}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def test_flag_table_is_current():
    assert put_table(README.read_text()) == README.read_text(), "python tests/test_readme.py writes it anew"


def test_flag_table_notices_a_change(monkeypatch):
    text, source = README.read_text(), inspect.getsource(train.Config)
    assert put_table(text, dataclasses.make_dataclass("Config", [("lr", float, 0.5)], bases=(train.Config,))) != text  # a default
    with pytest.raises(ValueError, match="no comment beside speed"):
        put_table(text, dataclasses.make_dataclass("Config", [("speed", float, 0.5)], bases=(train.Config,)))
    for old, new in (("# peak", "# summit"), ("    # model\n", "")):
        assert old in source and build_table(train.Config, source.replace(old, new)) != build_table(train.Config, source)
    assert build_table(train.Config, source).count("\n| `--") == len(dataclasses.fields(train.Config))


# ---- commands, files, links

def get_blocks(text):
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


def get_lines(text, *kinds):
    """(number, line) of what is in blocks of these kinds, without empty ones; a line that ends with a backslash goes on in the next."""
    for info, first, lines in get_blocks(text):
        number, begun = first, ""
        for i, line in enumerate(lines if info in kinds else [], first):
            number = number if begun else i
            begun += line.removesuffix("\\")
            if not line.endswith("\\"):
                if begun.strip():
                    yield number, begun
                begun = ""


def get_prose(text):
    """(number, line) of what is in no block."""
    inside = {number for _, first, lines in get_blocks(text) for number in range(first - 1, first + len(lines) + 1)}
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if number not in inside]


def get_spans(text):
    """(number, code) of each `code` in the prose."""
    return [(number, code) for number, line in get_prose(text) for code in re.findall(r"`([^`]+)`", line)]


def get_commands(text):
    """(number, words) of each command of this repository's that README shows, in a block or in the prose."""
    for number, line in [*get_lines(text, "", "bash run"), *get_spans(text)]:
        if re.search(r"\b(python3?|torchrun) |^make ", line):
            for command in re.split(r"&&|;", line.split("  #")[0]):
                words = [word for word in shlex.split(command, comments=True) if word not in ("…", "--help")]
                if "make" in words[:1]:
                    yield number, words
                elif starts := [i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"]:
                    yield number, words[starts[0]:]


def get_parser_flags(path):
    """Flags of an argparse parser, by its source."""
    return set(re.findall(r'add_argument\("(--\w+)"', path.read_text()))


def get_bench_flags():
    """Flags of each of bench.py's subcommands."""
    return {name: {f"--{flag}" for arg in inspect.signature(function).parameters for flag in (arg, f"no_{arg}")}
            for name, function in bench.COMMANDS.items()}


def check_flags(words, known):
    for word in words:
        if word.startswith("--") and word.split("=")[0] not in known:
            raise ValueError(f"unknown flag {word}")


def check_train(words):
    """A command line of train.py's, as far as no run has to be there. Raises ValueError."""
    preset = words[0] if words and not words[0].startswith("-") else None
    train.check_config(train.parse_flags(words[1:] if preset else words, train.load_preset(REPO / preset) if preset else train.Config()))


def check_submit(words):
    launch, presets, flags = submit.split_argv(words)
    train.parse_flags(launch, submit.Launch())
    for preset in presets or [submit.PAPER]:
        check_train([preset, *flags])


def check_with(default):
    def check(words):
        train.parse_flags(words[1:] if words and not words[0].startswith("-") else words, default)
    return check


CHECKS = {"train.py": check_train, "launch/job.py": check_train, "launch/submit.py": check_submit, "replay.py": check_with(replay.Replay()),
          "evaluate.py": check_with(evaluate.Evaluation()), "export.py": check_with(export.Export()),
          "bench.py": lambda words: check_flags(words[1:], get_bench_flags()[words[0]]),
          "study.py": lambda words: check_flags(words, ["--report"]), "tests/test_readme.py": lambda words: check_flags(words, [])}


def check_command(words):
    """Raises ValueError, KeyError or OSError for what wouldn't be accepted."""
    if words[0] == "make":
        targets = re.findall(r"^(\w[\w-]*):", (REPO / "Makefile").read_text(), re.MULTILINE)
        if unknown := [word for word in words[1:] if "=" not in word and word not in targets]:
            raise ValueError(f"no target {unknown[0]}")
    elif words[:2] in (["-m", "venv"], ["-m", "monitor.plot"], ["-m", "data.beton"], ["-m", "data.folder"]):
        if words[1] != "venv":
            check_flags(words[2:], get_parser_flags(REPO / f"{words[1].replace('.', '/')}.py"))
    else:
        CHECKS[words[0]](words[1:])


def get_anchors(path):
    """GitHub's anchors of a file's headings."""
    headings = [line.lstrip("#").strip() for _, line in get_prose(path.read_text()) if re.match("#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def get_known_flags():
    kinds = (train.Config, submit.Launch, replay.Replay, evaluate.Evaluation, export.Export)
    known = {f"--{f.name}" for kind in kinds for f in dataclasses.fields(kind)}.union(*get_bench_flags().values())
    return known.union({"--ttest", "--help"}, *(get_parser_flags(REPO / name) for name in ("data/beton.py", "data/folder.py", "monitor/plot.py")))


def get_presets(text):
    """Files of the table of presets, a * resolved, and those it names in vain."""
    section = re.search(r"^## Presets\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    named = [name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall("`(.+?)`", row)]
    found = {name: [f"config/{path.name}" for path in (REPO / "config").glob(name.removeprefix("config/"))] for name in named}
    return {path for paths in found.values() for path in paths}, [name for name, paths in found.items() if not paths]


def get_problems(text):
    """What README's text says that isn't so: ["12: …", …]."""
    problems, known = [], get_known_flags()
    for number, words in get_commands(text):
        try:
            check_command(words)
        except (ValueError, KeyError, OSError) as e:
            problems.append(f"{number}: {shlex.join(words)}: {e}")
    for number, code in get_spans(text):
        if code.startswith("--") and code.split()[0].split("=")[0] not in known:
            problems.append(f"{number}: unknown flag {code}")
        if re.fullmatch(r"[\w./-]+\.(py|md|txt|pbs)", code) and not any((REPO / folder / code).exists() for folder in ("", "config")):
            problems.append(f"{number}: no file {code}")
    for number, line in get_prose(text):
        for target in re.findall(r"\]\(([^)]+)\)", line):
            path, _, anchor = target.partition("#")
            if not re.match(r"\w+:", target):
                if not (REPO / path).exists():
                    problems.append(f"{number}: no file {path}")
                elif anchor and anchor not in get_anchors(REPO / path if path else README):
                    problems.append(f"{number}: no heading {target}")
    return problems


def test_commands_files_and_links():
    text = README.read_text()
    assert get_problems(text) == []
    assert {words[0] for _, words in get_commands(text)} >= CHECKS.keys() - {"study.py"} | {"make", "-m"}  # they were found
    assert len(re.findall(r"\]\((?!\w+:)", text)) >= 4


@pytest.mark.parametrize("text, says", [
    ("```\npython train.py config/debug.py --lrr 1\n```", "2: train.py config/debug.py --lrr 1: unknown flag --lrr"),
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
def test_problems_are_found(text, says):
    problems = get_problems(text)
    assert len(problems) == 1 and says in problems[0]


def test_every_preset_is_in_the_table_and_every_row_is_there():
    text, files = README.read_text(), {f"config/{path.name}" for path in (REPO / "config").glob("*.py")} - {"config/__init__.py"}
    assert get_presets(text) == (files, [])
    row = re.search(r"^\| `config/smoke.py`.*\n", text, re.MULTILINE)[0]
    assert get_presets(text.replace(row, ""))[0] == files - {"config/smoke.py"}
    assert get_presets(text.replace(row, row + "| `config/nope.py` | |\n"))[1] == ["config/nope.py"]


# ---- the diff

def load_patched(root, diff):
    """train.py of the snapshot `root` as a module, with `diff` applied."""
    done = subprocess.run(["git", "apply", "-"], input=diff, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("patched_train", root / "train.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_diff_is_a_variant(small, tmp_path, monkeypatch, no_figures):
    """Of five lines; without its flag it trains as before, to the bit, with it on the loss that torch means by it."""
    (diff,) = ["\n".join([*lines, ""]) for info, _, lines in get_blocks(README.read_text()) if info == "diff"]
    assert len(re.findall(r"^[+-](?![+-]{2} )", diff, re.MULTILINE)) == 5
    submit.take_snapshot(tmp_path / "code")
    subprocess.run(["git", "init", "-q", tmp_path / "code"], check=True)  # or git would look for a repository further up
    patched = load_patched(tmp_path / "code", diff)

    def run(name, module, *more):
        flags = "--loader folder --num_workers 0 --train_samples 600 --batch_size 50 --epochs 2 --max_steps 12 --lr_warmup_steps 1 --compile False".split()
        assert module.main([str(REPO / "config/debug.py"), *flags, *more, "--data_dir", str(small), "--run_dir", str(tmp_path / name)]) == 0
        return load_run(tmp_path / name)[1][0]["step_losses"]

    before, off, on = run("before", train), run("off", patched), run("on", patched, "--label_smoothing", "0.5")
    monkeypatch.setattr(F, "cross_entropy", functools.partial(F.cross_entropy, label_smoothing=0.5))
    apart = lambda losses: max(abs(a - b) for a, b in zip(on, losses, strict=True))
    assert apart(run("torch", train)) < 1e-3 and apart(off) > 5e-3
    assert off == before
    assert_same(weights(tmp_path / "off"), weights(tmp_path / "before"))
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), not 1.5"):
        patched.check_config(patched.Config(label_smoothing=1.5))
    with pytest.raises(AssertionError, match="patch does not apply"):
        load_patched(tmp_path / "code", diff)  # twice


# ---- the runnable blocks

def run_blocks(text, root, timeout=240):
    """Run every line of the runnable blocks by bash in `root`, in order; the first that fails ends the test. Prints how long each took,
    returns their number."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    env |= {"PATH": f"{root / '.venv/bin'}{os.pathsep}{env['PATH']}", "HF_HUB_OFFLINE": "1"}
    lines = list(get_lines(text, "bash run"))
    for number, line in lines:
        start = time.perf_counter()
        process = subprocess.Popen(["bash", "-e", "-c", line], cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, errors="replace", start_new_session=True)
        try:
            output, status = process.communicate(timeout=timeout)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, status = process.communicate()[0], f"none after {timeout} s"
        finally:
            if process.poll() is None:  # Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
        if status != 0:
            raise AssertionError(f"README.md:{number}: {line}\nstatus {status}\n{output[-5000:]}")
        print(f"{time.perf_counter() - start:5.1f} s  {line}")
    return len(lines)


def test_a_line_that_fails_is_named(tmp_path):
    text = "```\nfalse\n```\n```bash run\ntouch one\ntest -f one; echo said; false | true\n```\n\n```bash run\n\nls \\\n  two; touch three\ntouch four\n```\n"
    with pytest.raises(AssertionError, match=r"README.md:11: ls   two; touch three\nstatus 2\n.*two.*No such file"):
        run_blocks(text, tmp_path)
    assert os.listdir(tmp_path) == ["one"]
    with pytest.raises(AssertionError, match=r"README.md:2: sleep 60\nstatus none after 0.2 s"):
        run_blocks("```bash run\nsleep 60\n```", tmp_path, timeout=0.2)


def write_photos(root, classes):
    """A tree of JPEGs of many sizes for README's ImageFolder: waves, whose length is the class's."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(230, 400, 2)
                y, x = np.mgrid[:height, :width] / (5 + 8 * label) + rng.uniform(0, 6, (2, 1, 1))
                image = np.stack([128 + 100 * np.sin(x), 128 + 100 * np.cos(y), np.full((height, width), 40.0)], axis=2)
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.jpg")


def test_each_of_the_five_things_can_be_run():
    """Each has a block that the next test runs."""
    section = re.search(r"^## The five usual things\n(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)[1]
    parts = section.split("\n### ")[1:]
    assert [part[0] for part in parts] == list("12345") and all("```bash run\n" in part for part in parts)


@pytest.mark.slow
def test_a_newcomers_road(tmp_path):
    """Every runnable block, in order, in a clean checkout with an environment and Fashion-MNIST, as `make train` leaves them."""
    data = REPO / "datasets/fashion_mnist"
    try:
        import_ffcv()
    except UserError as e:
        pytest.skip(str(e))
    if not (data / "val.beton").exists():
        pytest.skip("no Fashion-MNIST here: make data")
    text, root = README.read_text(), tmp_path / "checkout"
    submit.take_snapshot(root)
    subprocess.run(["git", "init", "-q", root], check=True)
    (root / ".venv").symlink_to(sys.prefix)
    (root / "datasets").mkdir()
    (root / "datasets/fashion_mnist").symlink_to(data.resolve())
    write_photos(root / "datasets/photos", int(re.search(r"--data_dir datasets/photos --num_classes (\d+)", text)[1]))
    assert run_blocks(text, root) >= 10
    phases = [e["phase"] for e in load_run(root / "runs/small")[1]]
    assert list(dict.fromkeys(phases)) == ["full", "warmup", "lora"]  # what is exported has adapters, and the replay can be compared


if __name__ == "__main__":
    README.write_text(put_table(README.read_text()))
