"""What is said when a run can't begin, has to stop, or loses a process; and the exit status it ends with."""

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace_json

from errors import SharedError, UserError
from launch.distributed import finish, get_world_rank
from model import checkpoint

# ----------------------------------------------------------------------------------------------------
# any failure


def refuse(error: Exception) -> int:
    """Say why a run, or another command on several processes, can't begin. Returns the exit status.

    2 for a UserError, which every process has and process 0 prints; 1 where another process is lost. Anything
    else is a bug and is raised on.
    """
    if is_lost_process(error):
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not isinstance(error, UserError):
        raise error
    if get_world_rank() == 0:
        print(f"error: {error}", file=sys.stderr)
    finish()
    return 2


def explain(error: BaseException, run_dir: str | Path, log: Callable[..., None]) -> int:
    """Say why a run had to stop once work had begun. Returns the exit status. `log`: what `process_log` gave.

    Called where the exception is handled, so that its traceback goes to the process's log. A bug is raised
    on.
    """
    is_first = get_world_rank() == 0
    if isinstance(error, KeyboardInterrupt):
        again = f"--run_dir {shlex.quote(str(run_dir))} --resume True"
        log(f"interrupted: go on with {again}", console=is_first)
        return 130
    if isinstance(error, FloatingPointError):  # every process has it
        log(f"error: {error}; last checkpoint: {checkpoint.latest(Path(run_dir))}", console=is_first)
    elif isinstance(error, SharedError):  # this one, too
        log(f"error: {error}", console=is_first)
    elif isinstance(error, UserError):  # this process's own: an image that can't be read
        log(f"error: {error}")
    elif is_lost_process(error):
        log(*explain_lost_process(Path(run_dir), error))
    else:
        raise error
    return 1


# ----------------------------------------------------------------------------------------------------
# a lost process


def is_lost_process(error: BaseException) -> bool:
    """Whether an exception comes from a collective that another process left or never joined (gloo's are
    plain RuntimeErrors).
    """
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def explain_lost_process(run_dir: Path, error: BaseException, patience: float = 5.0) -> tuple[str, bool]:
    """One sentence: which collective this process was in, by torch's flight recorder, and which processes
    never came or are gone; and whether this process is the first to find out, the one to say it.

    Every process that ends here says so in the store; whichever has not after `patience` seconds is the one
    that hangs or died. Of the collective's own processes, if one of them has not: others may be waiting, in
    groups of theirs, for processes that are ending here. The recorder goes to
    RUN/logs/flight_recorder_RANK.json.
    """
    where, members = get_last_collective(run_dir)
    world_rank, world_size = dist.get_rank(), dist.get_world_size()
    missing, is_first = [], True
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"stuck/{world_rank}", where)
        is_first = store.add("stuck", 1) == 1
        deadline = time.monotonic() + patience
        while True:
            missing = [other for other in range(world_size) if not store.check([f"stuck/{other}"])]
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    except (RuntimeError, OSError):
        missing = missing or [0]  # process 0 keeps the store, unless torchrun does
    missing = [other for other in missing if other in members] or missing
    who = "no rank (all of them gave up waiting)"
    if missing:
        plural = "s" if len(missing) > 1 else ""
        who = f"rank{plural} {', '.join(map(str, missing))}"
    return f"error: {who} did not join {where}: {str(error).splitlines()[0][:200]}", is_first


def get_last_collective(run_dir: Path) -> tuple[str, list[int]]:
    """What the flight recorder, which is written to RUN/logs, has as this process's last collective, in
    words, and the world ranks of the collective's processes.
    """
    recorded = _dump_fr_trace_json(True, False)
    with contextlib.suppress(OSError):
        (run_dir / "logs" / f"flight_recorder_{dist.get_rank()}.json").write_bytes(recorded)
    members = list(range(dist.get_world_size()))
    entries = json.loads(recorded).get("entries")
    if not entries:
        return "a collective", members
    last = entries[-1]
    group_name, group_description = last["process_group"]
    for group, name in dist.distributed_c10d._world.pg_names.items():
        if name == group_name:
            members = dist.get_process_group_ranks(group)
    where = f"{last['profiling_name']} number {last['collective_seq_id']} of group {group_description}, "
    return where + f"shape {last['input_sizes']}", members
