"""python bench.py gpu: what one GPU can say, in one command of six minutes.

Each part is in a process of its own with a limit to its time: a part that raises, hangs or breaks the CUDA
context costs its own rows and nothing else. The processes are forked from one that has imported everything
and never asked anything of CUDA, because a fork of one that has can't use it.

A part is a function of a Check (benchmarks/gpu_findings.py) and a row of PARTS. It computes on
`check.device`, at tiny sizes if `check.tiny`, says its lines with `say` and leaves numbers with `record`. All
parts share the numbers' names: 4 reads `matmul` and `bandwidth` of 0, 8 reads `losses, …` of 2. What a part
forks itself it must fork before it first asks anything of CUDA (gpu_step.start_simulation)."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import torch

from benchmarks import gpu_loader, gpu_operators, gpu_runs, gpu_step
from benchmarks.choices import describe_device
from benchmarks.gpu_findings import Check
from errors import UserError
from files import write_json

# All parts together. Their limits add up to more: if many of them are slow, the last ones do not begin, and
# --parts asks for those in a second command.
TOTAL_SECONDS = 360


@dataclass
class Part:
    number: int
    title: str
    seconds: int  # its limit on a GPU
    run: Callable[[Check], None]


PARTS = [
    Part(0, "ceilings: copies and products of this GPU", 40, gpu_operators.measure_ceilings),
    Part(1, "operators against float64", 60, gpu_operators.check_operators),
    Part(2, "losses of the three phases against a CPU's", 90, gpu_runs.check_losses),
    Part(3, "L/16, 64 images, bfloat16: a step of each phase", 100, gpu_step.time_phases),
    Part(4, "where a step's time goes, beside the roofline", 70, gpu_step.profile_phases),
    Part(5, "pytest -m gpu", 110, gpu_runs.run_tests),
    Part(6, "loader to GPU", 40, gpu_loader.check_loader),
    Part(7, "resume", 80, gpu_runs.check_resume),
    Part(8, "FSDP2 on a mesh of one process", 45, gpu_runs.check_fsdp),
    Part(9, "Hugging Face with PEFT and timm beside it, eagerly", 60, gpu_step.compare_peers),
]


@dataclass
class Outcome:
    """What is known of a part when it is over."""

    title: str
    status: str = "failed"  # passed; failed: a row does not hold; error; out of time; not begun
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    figures: dict = field(default_factory=dict)
    error: str | None = None  # its traceback


# ------------------------------------------------------------------------------------------------------------
# a part in its own process


def enter(run: Callable[[Check], None], check: Check, log: Path) -> None:
    """What the part's process does: leads a process group, prints into `log`, sends what it finds."""
    os.setsid()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        torch.manual_seed(0)
        run(check)
    except BaseException:
        traceback.print_exc()
        check.pipe.send(("error", traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    check.pipe.close()
    os._exit(0)  # no exit handler of CUDA or of a compiler's pool is waited for


def run_in_process(part: Part, check: Check, limit: float, log: Path) -> Outcome:
    """A part's outcome, after `limit` seconds at the latest; no process that it started is left."""
    outcome, began = Outcome(part.title), time.perf_counter()
    receiver, check.pipe = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=enter, args=(part.run, check, log))
    process.start()
    check.pipe.close()
    ended = out_of_time = False
    while not ended and not out_of_time:
        left = max(0.0, limit - (time.perf_counter() - began))
        # Not the pipe's end alone: a process that the part has started may hold it open.
        ready = wait([receiver, process.sentinel], left)
        ended, out_of_time = process.sentinel in ready, not ready
        while receiver.poll():
            try:
                take(outcome, *receiver.recv())
            except EOFError:
                ended = True
                break
    if out_of_time:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    process.join()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # compilers and loaders that outlive it
    outcome.seconds = time.perf_counter() - began
    outcome.status = get_status(outcome, out_of_time, process.exitcode)
    if outcome.status == "error" and outcome.error is None:
        outcome.error = f"its process ended with status {process.exitcode}"
    return outcome


def take(outcome: Outcome, kind: str, message) -> None:
    """Into the outcome what the part's process has sent."""
    if kind == "row":
        outcome.rows.append(message)
    elif kind == "figure":
        outcome.figures[message[0]] = message[1]
    else:
        outcome.error = message


def get_status(outcome: Outcome, out_of_time: bool, exitcode: int) -> str:
    if out_of_time:
        return "out of time"
    if outcome.error or exitcode:
        return "error"
    if any(row["holds"] is False for row in outcome.rows):
        return "failed"
    return "passed"


# ------------------------------------------------------------------------------------------------------------
# the device, asked in a process of its own


def look_at_device(check: Check) -> None:
    """What the GPU is, for the report's head; raises nothing where there is none."""
    check.record("available", torch.cuda.is_available())
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        check.record("memory_bytes", properties.total_memory)
        check.record("capability", list(torch.cuda.get_device_capability(0)))
    check.record("device", describe_device())


# ------------------------------------------------------------------------------------------------------------
# the command


def gpu(
    out: str = "runs/gpu",
    parts: tuple[int, ...] = tuple(part.number for part in PARTS),
    dry_run: bool = False,
    reference: str | None = None,
) -> dict:
    """What one GPU can say, within six minutes: is it right, how fast, and why.

    out: folder; report.json there is written after every part, log.txt has what the parts printed. parts:
    which, by number; they run in ascending order, and 4 uses 0's ceilings, or else 70 and 80 % of an H100's
    data sheet. dry_run: all of it at tiny sizes on the CPU; its figures mean nothing. reference:
    checkpoints and losses that `python -m benchmarks.gpu_reference DIR` made on another machine's CPU;
    without it part 2 (or 8) makes them on this one's. Prints a table at its end and returns the report. Exit
    status 1 if a part has not passed.
    """
    if not parts:
        raise UserError("--parts needs a number or more")
    unknown = sorted(set(parts) - {part.number for part in PARTS})
    if unknown:
        raise UserError(f"parts are 0 to {PARTS[-1].number}, not {', '.join(map(str, unknown))}")
    if reference is not None and not (Path(reference) / "losses.json").exists():
        raise UserError(f"{reference} has no losses.json: python -m benchmarks.gpu_reference {reference}")
    folder = make_folder(Path(out))
    report = {"torch": torch.__version__, "dry_run": dry_run, "parts": {}}
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(reference).resolve() if reference else Path(scratch) / "reference"

        def prepare(part: Part, figures: dict) -> Check:
            own = Path(scratch) / str(part.number)
            own.mkdir()
            device = torch.device("cpu") if dry_run else torch.device("cuda", 0)
            return Check(device, dry_run, own, where, dict(figures))

        look = Part(-1, "the device", 60, look_at_device)
        seen = run_in_process(look, prepare(look, {}), look.seconds, folder / "log.txt")
        if seen.status != "passed":
            why = get_last_line(seen.error)
            raise UserError(f"torch could not be asked for its GPU: {seen.status}, {why}")
        if not seen.figures["available"] and not dry_run:
            raise UserError(
                "bench.py gpu needs a CUDA GPU and torch sees none here; --dry_run goes through all parts at "
                "tiny sizes on the CPU"
            )
        report |= seen.figures
        if dry_run:
            report["device"] = "a dry run on the CPU"
        run_parts(report, [part for part in PARTS if part.number in parts], prepare, folder)
    print_table(report)
    return report


def make_folder(folder: Path) -> Path:
    """The output's folder, with an empty log. Raises UserError if it can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").write_text("")
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}") from None
    return folder


def run_parts(report: dict, parts: list[Part], prepare: Callable, folder: Path) -> None:
    """Run the parts one after the other, and write the report after each."""
    began, figures = time.perf_counter(), {}
    for part in parts:
        left = TOTAL_SECONDS - (time.perf_counter() - began)
        limit = min(part.seconds, left)
        if report["dry_run"]:
            limit = 10 * part.seconds  # two cores compile for minutes what a GPU's node does in seconds
        print(f"{part.number} {part.title} …", flush=True)
        with open(folder / "log.txt", "a") as log:
            log.write(f"\n==== {part.number} {part.title}\n")
        if limit < 5:
            outcome = Outcome(part.title, "not begun", error=f"the {TOTAL_SECONDS} s were over")
        else:
            outcome = run_in_process(part, prepare(part, figures), limit, folder / "log.txt")
        figures |= outcome.figures
        print(f"  {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        report["parts"][str(part.number)] = vars(outcome)
        report["seconds"] = time.perf_counter() - began
        write_json(folder / "report.json", report)


def print_table(report: dict) -> None:
    """Every part's rows, and the last line of what went wrong."""
    print(f"\n{report['device']}, torch {report['torch']}, {report['seconds']:.0f} s")
    for number, part in report["parts"].items():
        print(f"\n{number} {part['title']}: {part['status']}, {part['seconds']:.0f} s")
        for row in part["rows"]:
            mark = {None: " ", True: "+", False: "-"}[row["holds"]]
            print(f"  {mark} {row['what']:58} {row['text']}")
        if part["error"]:
            print(f"  - {get_last_line(part['error'])}")
    print(f"\n+ holds, - does not. {json.dumps(count_statuses(report))}")


def get_last_line(error: str | None) -> str:
    return error.strip().splitlines()[-1] if error else "without a word"


def count_statuses(report: dict) -> dict[str, int]:
    """How many parts have which status."""
    statuses = [part["status"] for part in report["parts"].values()]
    return {status: statuses.count(status) for status in dict.fromkeys(statuses)}


def passed(report: dict) -> bool:
    """Whether all parts of a report that were asked for have passed."""
    return all(part["status"] == "passed" for part in report["parts"].values())
