"""Reading a run directory: config.json, metrics.jsonl, steps.jsonl, ranks.json. Needs neither torch nor
matplotlib.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from files import explain_no_run, is_run, read_json

FROZEN = "full, frozen"  # the full phase once its lowest blocks are frozen (mode full with freeze_blocks)


class Run(NamedTuple):
    """What a run directory holds, records in file order."""

    config: dict
    epochs: list[dict]  # the epoch records
    switches: list[dict]  # the switch records


def load_run(run_dir: str | Path) -> Run:
    """Read config.json and metrics.jsonl of a run. Other events than epochs and switches are passed over.

    The last line of a killed run may be torn; it is skipped with a printed note.
    Raises UserError for a missing directory or config, a damaged file, or a run without a finished epoch.
    """
    config, events = read_run(run_dir)
    return Run(config, pick_events(events, "epoch"), pick_events(events, "switch"))


def read_run(run_dir: str | Path) -> tuple[dict, list[dict]]:
    """config.json, and all events of metrics.jsonl. Raises UserError as `load_run` does."""
    run_dir = Path(run_dir)
    if not (is_run(run_dir) or (run_dir / "config.json").exists()):
        raise UserError(explain_no_run(run_dir))
    config = read_json(run_dir / "config.json")
    events = read_events(run_dir / "metrics.jsonl")
    if not pick_events(events, "epoch"):
        raise UserError(f"{run_dir} has no finished epoch")
    return config, events


def read_events(path: Path) -> list[dict]:
    """The JSON objects of a file that has one on each line; [] for a file that is missing.

    A last line that is no object was torn when its process was killed: it is skipped with a printed note.
    Raises UserError for a file that can't be read, or another line that is no JSON object.
    """
    lines = read_lines(path)
    if lines and parse_line(lines[-1][1]) is None:
        print(f"note: {path}: skipped a torn last line")
        lines = lines[:-1]
    return parse_lines(path, lines)


def read_events_until(path: Path, length: int) -> list[dict]:
    """The JSON objects in the first `length` bytes of a file, which end with a whole line; [] for a missing
    file.

    Raises UserError for a file that can't be read, or a line that is no JSON object.
    """
    return parse_lines(path, read_lines(path, length))


def read_lines(path: Path, length: int = -1) -> list[tuple[int, str]]:
    """(number, text) of the lines in the first `length` bytes (-1: in all of the file) that are not blank."""
    try:
        with open(path, "rb") as file:
            text = file.read(length).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def parse_lines(path: Path, lines: list[tuple[int, str]]) -> list[dict]:
    """Raises UserError, naming file and line, for one that is no JSON object, and where epochs, or in
    steps.jsonl steps, don't rise by one."""
    events, last = [], None
    for number, line in lines:
        event = parse_line(line)
        if event is None:
            raise UserError(f"{path}: line {number} is not a JSON object")
        events.append(with_nan(event) if event.get("event") == "epoch" else event)
        kind = event.get("event", "step")  # a line of steps.jsonl says no event
        if kind not in ("epoch", "step"):
            continue
        if last is not None and event.get(kind) != last + 1:
            raise UserError(
                f"{path}: line {number} has {kind} {event.get(kind)} after {kind} {last}: two processes have "
                "written this log at once, or lines are lost, so begin the run anew in another --run_dir"
            )
        last = event.get(kind)
    return events


def with_nan(epoch: dict) -> dict:
    """An epoch's record with NaN where its log has null for a number that was not finite.

    A validation loss of null is one only beside a top-1: without that nothing was evaluated.
    """
    changed = {}
    for key in ("weight_norms", "adapter_norms"):
        if isinstance(epoch.get(key), dict):
            changed[key] = {family: list(map(to_float, layers)) for family, layers in epoch[key].items()}
    lost = ["train_loss"]
    if epoch.get("val_top1") is not None:
        lost.append("val_loss")
    for key in lost:
        if key in epoch:
            changed[key] = to_float(epoch[key])
    return epoch | changed


def to_float(value: float | None) -> float:
    return math.nan if value is None else value


def parse_line(line: str) -> dict | None:
    """The line's JSON object, None if it holds none: a torn `12.5` is valid JSON, too."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def pick_events(events: list[dict], kind: str) -> list[dict]:
    """The events of one kind: start, epoch, switch or warning."""
    return [event for event in events if event.get("event") == kind]


def get_ranks(run_dir: str | Path, switches: list[dict]) -> dict[str, list[int]] | None:
    """The ranks of the last switch that names some, else those of ranks.json (a run in mode=lora), else None.

    Raises UserError for a damaged ranks.json.
    """
    for switch in reversed(switches):
        if switch.get("ranks"):
            return switch["ranks"]
    path = Path(run_dir) / "ranks.json"
    if not path.exists():
        return None
    return read_json(path) or None


def get_stage(record: dict) -> str:
    """The phase of an epoch record, or FROZEN: what is trained differs there from the rest of its phase."""
    if record["phase"] == "full" and record.get("frozen_blocks"):
        return FROZEN
    return record["phase"]


def find_first_switch(switches: list[dict]) -> dict | None:
    """The first record of a switch from the full phase to adapters, None without one. A switch from full to
    full, which freezes blocks, is none."""
    return next((s for s in switches if s["from"] == "full" and s["to"] != "full"), None)


def check_logs(run_dir: str | Path, metrics_bytes: int, steps_bytes: int, checkpoint: str | Path) -> None:
    """Raise UserError if a log has lost what it held when `checkpoint`, which noted both lengths, was saved.

    A checkpoint of a run that wrote no steps.jsonl has noted 0 bytes: then the file may be missing.
    """
    lengths = {Path(run_dir) / "metrics.jsonl": metrics_bytes, Path(run_dir) / "steps.jsonl": steps_bytes}
    for path, length in lengths.items():
        if length and (not path.exists() or path.stat().st_size < length):
            raise UserError(f"{path} is missing or shorter than it was when {checkpoint} was saved")


def get_freeze_step(epochs: list[dict]) -> int | None:
    """The optimiser step after which the lora phase began: the last of the epochs before it, None without
    any."""
    steps = [record["step"] for record in epochs if record["phase"] != "lora"]
    return steps[-1] if steps else None


def phase_table(epochs: list[dict]) -> str:
    """The run's phases side by side, as plain text; FROZEN is a row of its own.

    Seconds and images/s are medians over the phase's epochs, memory is the peak, top-1 the last one
    evaluated.
    """
    rows = [("phase", "epochs", "s/epoch", "images/s", "trainable", "peak memory", "top-1")]
    for phase in dict.fromkeys(map(get_stage, epochs)):
        records = [record for record in epochs if get_stage(record) == phase]
        seconds = get_upper_median([record["epoch_seconds"] for record in records])
        rate = get_upper_median([record["images_per_second"] for record in records])
        trainable = records[-1]["trainable_params"]
        peak_gib = max(record["peak_memory_bytes"] for record in records) / 2**30
        evaluated = [record["val_top1"] for record in records if record["val_top1"] is not None]
        top1 = f"{evaluated[-1]:.2f} %" if evaluated else "-"
        count = str(len(records))
        rows.append(
            (phase, count, f"{seconds:.1f}", f"{rate:,.0f}", f"{trainable:,}", f"{peak_gib:.2f} GiB", top1)
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def get_upper_median(values: list[float]) -> float:
    """The median; of an even number of values the upper of the middle two, so that it is one that was
    measured.
    """
    return sorted(values)[len(values) // 2]
