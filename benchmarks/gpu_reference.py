"""python -m benchmarks.gpu_reference DIR: checkpoints of the three phases, from which parts 2 and 8 of
`python bench.py gpu` start, and what twenty more steps from each make of the loss, on a CPU in float32.

A few seconds and 13 MB. The run trains the smallest model on made-up images, so it needs no files, and it
draws nothing on the device: CPU and CUDA draw other numbers from one seed.
"""

import contextlib
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.device_mesh import DeviceMesh

import train
from benchmarks.contenders import PHASES
from data.loader import build_loader, prefetch
from errors import UserError
from files import expand_home, write_json
from model import checkpoint, parallel
from model.optim import build_optimizer
from model.variants import VARIANTS
from start import State

STEPS = 20
# Full for two epochs, warmup for one, LoRA for one. Everything random is drawn on the host (mixup), nothing
# on the device (dropout, drop path).
RUN = (
    "--model tiny-debug --dataset fashion_mnist --loader synthetic --train_samples 1280 --batch_size 64 "
    "--epochs 4 --switch_epoch 2 --lora_warmup_epochs 1 --lr 1e-3 --lr_warmup_steps 10 --mixup 0.2 "
    "--rank_min 8 --rank_max 32 --tau 90 --zeta 90 --window_epochs 1 --num_windows 2 --eval_every 4"
).split()
LEARNING_RATE = 1e-3


def main(argv: list[str]) -> int:
    """Exit status: 0, or 2 for a user's mistake."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("error: python -m benchmarks.gpu_reference DIR", file=sys.stderr)
        return 2
    try:
        make_reference(Path(expand_home(argv[0])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"python bench.py gpu --reference {shlex.quote(argv[0])} holds a GPU to what is there")
    return 0


def make_reference(folder: Path) -> None:
    """Write `folder`: full/, warmup/ and lora/, the checkpoints, the base that lora/ needs beside it, and
    losses.json: {phase: [(loss, gradient norm) of each of STEPS steps]}, computed on this CPU. What was there
    before under these names goes. losses.json comes last."""
    cpu = torch.device("cpu")
    parallel.set_up_device(cpu, VARIANTS["tiny-debug"]["embed_dim"])
    with tempfile.TemporaryDirectory() as run_dir:
        flags = [*RUN, "--dtype", "float32", "--compile", "False", "--run_dir", run_dir]
        with contextlib.redirect_stdout(sys.stderr):
            # Without the GPU, if there is one: both are to start from what a CPU has made.
            status = run_on_cpu(flags)
        if status:
            raise RuntimeError(f"the run for the reference ended with status {status}")
        for path, meta in checkpoint.kept(Path(run_dir)):
            replace(folder / meta["state"]["phase"], path)
            base = checkpoint.get_base(path, meta)
            if base is not None:
                replace(folder / base.name, base)
    losses = {phase: get_losses(folder / phase, cpu, "float32", compiled=False) for phase in PHASES}
    write_json(folder / "losses.json", {"torch": torch.__version__, "losses": losses})


def replace(target: Path, source: Path) -> None:
    """Make `target` a copy of the folder `source`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def run_on_cpu(flags: list[str]) -> int:
    """train.main(flags) on the CPU, whatever else there is."""
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        return train.main(flags)


def get_losses(
    path: Path,
    device: torch.device,
    dtype: str,
    compiled: bool,
    mesh: DeviceMesh | None = None,
    lr: float = LEARNING_RATE,
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of STEPS of train.py's steps on `device`, from the checkpoint at `path` on.

    The batches are the run's own after that checkpoint; nothing is written. The caller has set the device
    up. Raises FloatingPointError for a loss or norm that is not finite."""
    meta = checkpoint.verify(path)
    s = State(**meta["state"])
    cfg = train.Config(**meta["config"] | {"dtype": dtype, "compile": compiled})
    model = train.build_model(cfg, s.phase, s.ranks, device, mesh, s.frozen_blocks)
    optimizer = build_optimizer(model, cfg.weight_decay)
    checkpoint.load(path, model, optimizer)
    model.train()
    options = dict(seed=cfg.seed, num_samples=cfg.train_samples)
    loader = build_loader(cfg.loader, cfg.dataset, cfg.data_dir, "train", cfg.batch_size, **options)
    batches = prefetch(loader.epoch(s.epoch), device)
    failed = torch.zeros((), dtype=torch.bool, device=device)
    results = []
    for step in range(s.step, s.step + STEPS):
        results.append(train.train_step(cfg, model, optimizer, batches, step, lr, failed))
    batches.close()
    if failed:
        raise FloatingPointError(f"from {path} on, {dtype}: a loss or gradient norm was not finite")
    return [(loss, norm) for loss, _, norm, _ in torch.stack(results).tolist()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
