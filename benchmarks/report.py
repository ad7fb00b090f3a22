"""python bench.py all: every command, its output into docs/bench.md."""

import datetime
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.choices import describe_device
from errors import UserError
from files import expand_home

# command line -> what to read it for
# fmt: off
SECTIONS = {
    "step --modes compiled --rounds 5":
        "A step of each phase, ViT-S/16, beside Hugging Face, PEFT and timm. The last line is for scripts.",
    "step --model B/16 --modes compiled --rounds 5": "The same at B/16.",
    "switch": "What a run waits for at each switch, and what the monitor costs.",
    "memory --dp_shard 1 --fit 40":
        "Memory of a process, plain replication, and the images that fit in 40 GiB.",
    "memory --dp_shard 1 --activation_checkpointing none --grad_accum_steps 2":
        "The same with gradients kept from micro-batch to micro-batch.",
    "memory --dp_shard 64 --activation_checkpointing none": "Sharded over all processes.",
    "wire": "What each process sends in a step.",
    "estimate": "An estimate of 64 A100s.",
    "data": "Data loading.",
}
# fmt: on
START = "<!-- "  # of a section, behind it the command and -->


def write_report(out: str = "docs/bench.md", only: tuple[str, ...] = ()) -> None:
    """Run SECTIONS one after the other and write OUT after each. only: words; sections whose command has one
    of them are run anew, the others keep what OUT says. Raises UserError if a command fails, with what was
    done kept."""
    path = Path(expand_home(out))
    sections = read_sections(path) if only else {}
    asked = [command for command in SECTIONS if not only or set(only) & set(command.split())]
    kept = {command: text for command, text in sections.items() if command not in asked}
    for command in asked:
        print(f"bench.py {command}", flush=True)
        kept[command] = run_section(command)
        write_sections(path, kept)


def run_section(command: str) -> str:
    """What goes into the report of a command: heading, what to read it for, what it printed."""
    arguments = [sys.executable, "bench.py", *command.split()]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench.py {command} failed:\n{done.stderr}")
    about = f"{SECTIONS[command]} {describe_device()}, torch {torch.__version__}, {datetime.date.today()}."
    return f"## python bench.py {command}\n\n{about}\n\n```\n{done.stdout.strip()}\n```"


def read_sections(path: Path) -> dict[str, str]:
    """command -> its section in the report, {} without a report."""
    if not path.exists():
        return {}
    sections = {}
    for part in path.read_text().split(START)[1:]:
        command, text = part.split(" -->\n", 1)
        sections[command] = text.strip()
    return sections


def write_sections(path: Path, sections: dict[str, str]) -> None:
    """Write the report. Raises UserError if it can't be written."""
    text = "# Measured\n\nWritten by `python bench.py all`; README.md says what follows from it.\n\n"
    text += "\n\n".join(f"{START}{key} -->\n{sections[key]}" for key in SECTIONS if key in sections)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from None
