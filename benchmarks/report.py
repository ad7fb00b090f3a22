"""python bench.py all: every command, its output into docs/bench.md."""

import datetime
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.step import describe_device

# command line -> what to read it for
SECTIONS = {
    "step": "A step of each phase, ViT-S/16, beside Hugging Face, PEFT and timm. The last line is for scripts.",
    "step --model B/16": "The same at B/16.",
    "step --no_onednn --modes eager": "S/16 with torch's own float32 products for all: what is left where MKL is as fast as oneDNN.",
    "switch": "What a run waits for at each switch, and what the monitor costs.",
    "memory --dp_shard 1 --fit 40": "Memory of a rank, plain replication, and the images that fit in 40 GiB.",
    "memory --dp_shard 1 --activation_checkpointing none --grad_accum_steps 2": "The same with gradients kept from micro-batch to micro-batch.",
    "memory --dp_shard 64 --activation_checkpointing none": "Sharded over all ranks.",
    "wire": "What each rank sends in a step.",
    "estimate": "An estimate of 64 A100s.",
    "data": "Data loading.",
}


def write_report(out: str = "docs/bench.md", only: tuple[str, ...] = ()) -> None:
    """Run SECTIONS one after the other and write OUT after each. only: words; sections whose command has one of them are run anew, the others keep
    what OUT says. Raises RuntimeError if a command fails, with what was done kept."""
    path, start = Path(out), "<!-- "
    old = (
        {}
        if not path.exists()
        else {
            part.split(" -->")[0]: part.split(" -->\n", 1)[1].strip()
            for part in path.read_text().split(start)[1:]
        }
    )
    new = {
        command: old[command]
        for command in SECTIONS
        if command in old and only and not any(word in command.split() for word in only)
    }
    for command, about in SECTIONS.items():
        if command not in new and (not only or any(word in command.split() for word in only)):
            print(f"bench.py {command}", flush=True)
            done = subprocess.run(
                [sys.executable, "bench.py", *command.split()],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"bench.py {command} failed:\n{done.stderr}")
            new[command] = (
                f"## python bench.py {command}\n\n{about} {describe_device()}, torch {torch.__version__}, "
                f"{datetime.date.today()}.\n\n```\n{done.stdout.strip()}\n```"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "# Measured\n\nWritten by `python bench.py all`; README.md says what follows from it.\n\n"
            + "\n\n".join(f"{start}{key} -->\n{new[key]}" for key in SECTIONS if key in new)
            + "\n"
        )
