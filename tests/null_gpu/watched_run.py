"""train.py with its flags on the null GPU, watched: from one look at the results to the next the host must
not wait for the GPU. For runs with 6 steps an epoch (STEPS), as

    python -m tests.null_gpu.watched_run --loader synthetic --train_samples 120 --batch_size 20 \\
        --epochs 6 --dtype bfloat16 --lr_warmup_steps 1 --run_dir FOLDER

Its last line is `watched steps: N, waits: M`; at waits that torch knows it raises an error itself. With
`--plant_item` as the first flag the step asks the GPU for a number: the control, which ends so.

Of train.py's names `get_lr` is where it watches. Two are replaced because every result is 0 here:
`decide_ranks`, since Algorithm 2 would have only zeros to go by, by ranks that are drawn; and `evaluate`,
where it would divide by the number of images it has seen.
"""

import sys

import torch

import train
from benchmarks.choices import get_ranks
from tests.null_gpu.counts import get_counts

STEPS = 6  # of an epoch, in the run that the tests ask for
LOOK_EVERY = 20  # steps: train.py's own, on a GPU

get_lr, train_step, evaluate = train.get_lr, train.train_step, train.evaluate
counted = {"waits": 0, "before": None, "steps": 0}


def watch(step: int, *args, **options) -> float:
    """train.get_lr, which is called as each step begins: the step before has ended. Watched are those that no
    look follows, and not an epoch's first, in which the loader begins."""
    waits = get_counts().waits
    if counted["before"] is not None:
        counted["waits"] += waits - counted["before"]
        counted["steps"] += 1
    last, look = step % STEPS == STEPS - 1, (step + 1) % LOOK_EVERY == 0
    watched = step % STEPS > 0 and not last and not look
    counted["before"] = waits if watched else None
    torch.cuda.set_sync_debug_mode("error" if watched else "default")
    return get_lr(step, *args, **options)


def take_step_with_item(*args) -> torch.Tensor:
    result = train_step(*args)
    result[0].item()
    return result


def evaluate_nothing(*args) -> dict[str, float]:
    try:
        return evaluate(*args)
    except ZeroDivisionError:
        return {"val_loss": 0.0, "val_top1": 0.0, "val_top5": 0.0}


def main(argv: list[str]) -> int:
    train.get_lr, train.evaluate = watch, evaluate_nothing
    train.decide_ranks = lambda cfg, *args: get_ranks("mixed", cfg.model)
    if argv[:1] == ["--plant_item"]:
        train.train_step = take_step_with_item
        argv = argv[1:]
    status = train.main(argv)
    print(f"\nwatched steps: {counted['steps']}, waits: {counted['waits']}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
