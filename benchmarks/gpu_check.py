"""python bench.py gpu: what one GPU can say, in one command of six minutes.

Each part is in a process of its own with a limit to its time: a part that raises, hangs or breaks the CUDA
context costs its own rows and nothing else. The processes are forked from one that has imported everything
and never asked anything of CUDA, because a fork of one that has can't use it.

A part is a function of a Check (benchmarks/gpu_findings.py) and a row of PARTS. It computes on
`check.device`, at tiny sizes if `check.tiny`, says its lines with `say` and leaves numbers with `record`. All
parts share the numbers' names: 4 reads `matmul` and `bandwidth` of 0, 8 reads `losses, …` of 2. What a part
forks itself it must fork before it first asks anything of CUDA (gpu_step.start_simulation)."""

import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import gpu_loader, gpu_operators, gpu_runs, gpu_step
from benchmarks.choices import describe_device
from benchmarks.gpu_findings import Check
from benchmarks.gpu_process import Outcome, Part, run_in_process
from errors import UserError
from files import expand_home, write_json

# Of all parts together; imports take the rest of six minutes. The parts' limits add up to more: if many of
# them are slow, the last ones do not begin, and --parts asks for those in a second command.
TOTAL_SECONDS = 350


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
    reference = reference and expand_home(reference)
    if reference is not None and not (Path(reference) / "losses.json").exists():
        command = shlex.join(["python", "-m", "benchmarks.gpu_reference", reference])
        raise UserError(f"{reference} has no losses.json: {command}")
    if dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # parts that ask by themselves see none, too
    began, folder = time.perf_counter(), make_folder(Path(expand_home(out)))
    report = {"torch": torch.__version__, "dry_run": dry_run, "parts": {}, "seconds": 0.0}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        where = Path(reference).resolve() if reference else Path(scratch) / "reference"

        def prepare(part: Part, figures: dict) -> Check:
            own = Path(scratch) / str(part.number)
            own.mkdir()
            device = torch.device("cpu") if dry_run else torch.device("cuda", 0)
            return Check(device, dry_run, own, where, dict(figures))

        look = Part(-1, "the device", 60, look_at_device)
        seen = run_in_process(look, prepare(look, {}), look.seconds, Path(scratch) / "look.txt")
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
        (folder / "log.txt").write_text("")
        (folder / "report.json").unlink(missing_ok=True)
        # Told to end it leaves as after an error: the part that runs is ended, what is known is printed.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            run_parts(report, [part for part in PARTS if part.number in parts], prepare, folder, began)
        finally:
            signal.signal(signal.SIGTERM, before)
            print_table(report)
    return report


def make_folder(folder: Path) -> Path:
    """The output's folder. Raises UserError if it can't be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").touch()
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}") from None
    return folder


def run_parts(report: dict, parts: list[Part], prepare: Callable, folder: Path, began: float) -> None:
    """Run the parts one after the other, until TOTAL_SECONDS after `began`, and write the report after
    each."""
    figures = {}
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
