"""What a step, a switch and data loading cost on this machine, beside peers and beside the arithmetic limit;
and what a step costs on many GPUs, without having them.

    python bench.py step                   full, warmup and LoRA step beside Hugging Face, PEFT and timm
    python bench.py step --model B/16 --ranks 64
    python bench.py switch                 how long a run stands still at each switch, and what it compiles
    python bench.py data                   images/s of FFCV, beside torchvision's DataLoader, same images
    python bench.py data --images /data/imagenet/val        … on a tree of one's own
    python bench.py wire                   ViT-L/16 on 64 processes: what each of them sends in a step
    python bench.py wire --model B/16 --world_size 16 --dp_shard 16
    python bench.py memory                 … with 64 images each: a process's peak, and what it is made of
    python bench.py memory --dp_shard 1 --activation_checkpointing none --grad_accum_steps 2 --fit 40
    python bench.py estimate --gpus 64 --device a100-40gb   an epoch by arithmetic, nothing is measured
    python bench.py roofline --device h100     one GPU's step from its kernels' FLOPs and bytes, counted
    python bench.py gpu --out DIR          on one GPU, in six minutes: is it right, how fast, and why
    python bench.py all                    all but gpu and roofline, into docs/bench.md: an hour on 2 cores
"""

import os
import sys

if sys.argv[1:2] == ["data"]:
    # The loader's threads and torch's would spin against each other on few cores; a step's products are
    # slower with it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # its word on every start and stop of the profiler

import tyro  # noqa: E402, the environment comes first

from benchmarks.estimate import estimate  # noqa: E402
from benchmarks.gpu_check import gpu, passed  # noqa: E402
from benchmarks.loading import data  # noqa: E402
from benchmarks.memory import memory  # noqa: E402
from benchmarks.report import write_report  # noqa: E402
from benchmarks.roofline import roofline  # noqa: E402
from benchmarks.step import MODES, PEERS, step  # noqa: E402
from benchmarks.switch import switch  # noqa: E402
from benchmarks.wire import wire  # noqa: E402
from errors import UserError, exit_with  # noqa: E402

COMMANDS = {
    "step": step,
    "switch": switch,
    "data": data,
    "wire": wire,
    "memory": memory,
    "estimate": estimate,
    "roofline": roofline,
    "gpu": gpu,
    "all": write_report,
}


def split_lists(argv: list[str]) -> list[str]:
    """`hf,peft` as `hf peft` and `0,1` as `0 1`, which is how tyro takes a list."""
    words = []
    for argument in argv:
        parts = argument.split(",")
        is_list = {*PEERS, *MODES}.issuperset(parts) or all(part.isdecimal() for part in parts)
        words += parts if is_list else [argument]
    return words


def main(argv: list[str]) -> int:
    """Exit status: 0; 1 where a part of `gpu` did not pass; 2 for a user's mistake."""
    try:
        result = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="bench.py", args=split_lists(argv), description=__doc__, use_underscores=True
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if argv[:1] == ["gpu"] and not passed(result) else 0


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
