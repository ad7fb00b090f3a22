import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from errors import exit_with


@pytest.mark.parametrize("status", [0, 2, None])
def test_a_command_leaves_with_its_status(status):
    with pytest.raises(SystemExit) as stop:
        exit_with(lambda argv: status, [])
    assert stop.value.code == status


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_with(lambda argv: 1 // 0, [])


@pytest.mark.parametrize("command", [["replay.py"], ["-m", "monitor.plot"], ["evaluate.py"]])
def test_ctrl_c_is_one_line(command, tmp_path):
    """While the command waits for a file that nobody writes."""
    log = "checkpoints/latest" if command == ["evaluate.py"] else "metrics.jsonl"
    (tmp_path / "checkpoints").mkdir()
    os.mkfifo(tmp_path / log)
    (tmp_path / "config.json").write_text("{}")
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, *command, tmp_path], cwd=root, stderr=subprocess.PIPE, text=True
    )
    writer = open_when_read(tmp_path / log)  # now it is at work, and no longer imports
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    os.close(writer)
    assert (process.returncode, said) == (130, "interrupted\n")


def open_when_read(fifo: Path) -> int:
    """The writing end of a FIFO, once somebody reads it."""
    for _ in range(600):
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # no reader yet
            time.sleep(0.1)
    raise TimeoutError(f"nobody reads {fifo}")
