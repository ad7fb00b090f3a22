"""conftest.py: tests see a GPU with -m gpu only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import asks_for_gpu

TESTS = Path(__file__).parent
# Asked when the tests are collected, of a child, as most tests ask.
LOOK = """
import os, subprocess, pytest
visible = subprocess.run("echo got:$CUDA_VISIBLE_DEVICES:", shell=True, capture_output=True, text=True).stdout
with open("seen", "a") as file:
    file.write(visible)

def test_plain():
    pass

@pytest.mark.gpu
def test_on_a_gpu():
    pass
"""


@pytest.mark.parametrize(
    "expression, asks",
    [
        ("", False),
        ("not slow", False),
        ("slow", False),
        ("not gpu", False),
        ("not slow and not gpu", False),
        ("gpuish", False),
        ("gpu", True),
        ("gpu and not slow", True),
        ("not slow and gpu", True),
    ],
)
def test_asks_for_gpu(expression, asks):
    assert asks_for_gpu(expression) == asks


@pytest.mark.parametrize(
    "flags, visible, result",
    [
        ("", "", "1 passed, 1 skipped"),
        ("-n 1", "", "1 passed, 1 skipped"),
        ("-m gpu", "7", "1 skipped, 1 deselected"),  # control; there is no eighth GPU
    ],
)
def test_a_gpu_is_seen_only_if_asked_for(tmp_path, flags, visible, result):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n")
    (tmp_path / "test_look.py").write_text(LOOK)
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-q", "-rs", *flags.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "7"},
        capture_output=True,
        text=True,
    )
    assert result in done.stdout, done.stdout + done.stderr
    assert "needs a CUDA device, which tests see with -m gpu only" in done.stdout
    assert set((tmp_path / "seen").read_text().split()) == {f"got:{visible}:"}
