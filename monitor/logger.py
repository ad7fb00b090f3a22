"""Where a run writes what happens: metrics.jsonl, steps.jsonl, TensorBoard, the progress bar.

metrics.jsonl has an event on each line: start, epoch, switch, warning. steps.jsonl has an optimiser step on
each line: {"step", "epoch", "loss", "grad_norm", "lr"}, floats in full precision. A number that is not finite
stands in both as null, because JSON has no NaN. Where it is a step's loss or norm the run ends there, and its
error names the step.
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from errors import UserError
from files import write_json
from monitor.figures import change_heatmap, rank_heatmap
from monitor.log import phase_table, pick_events, read_events_until

EPOCH_SCALARS = {  # TensorBoard's tag: the epoch record's field
    "train/loss": "train_loss",
    "train/top1": "train_top1",
    "train/lr": "lr",
    "val/loss": "val_loss",
    "val/top1": "val_top1",
    "val/top5": "val_top5",
    "val/ema_loss": "val_ema_loss",  # of the averaged weights, where there are some
    "val/ema_top1": "val_ema_top1",
    "val/ema_top5": "val_ema_top5",
    "perf/images_per_second": "images_per_second",
    "perf/mfu": "mfu",
    "perf/data_wait_fraction": "data_wait_fraction",
    "perf/epoch_seconds": "epoch_seconds",
    "perf/peak_memory_bytes": "peak_memory_bytes",
    "lora/trainable_params": "trainable_params",
}
STEP_SCALARS = {"step/loss": "loss", "step/grad_norm": "grad_norm", "step/lr": "lr"}


class RunLogger:
    """Writes one run's events, on process 0; elsewhere (`enabled` False) it is silent and only remembers.

    `metrics_bytes`, `steps_bytes`: both files are cut back to these lengths, which the checkpoint noted that
    the run resumes from; 0 where the run begins, or is forked. `step` and `total_steps` set the progress bar
    and TensorBoard's purge point.

    On every process alike, `epochs` holds the epoch records so far, by which the switch is decided, and
    `step_losses` the losses of the steps after the last of them. All methods that write raise UserError where
    that fails, on a full disk, say.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        total_steps: int,
        metrics_bytes: int = 0,
        steps_bytes: int = 0,
        enabled: bool = True,
    ):
        self.enabled, self.run_dir = enabled, run_dir
        self.traced: set[str] = set()  # phases
        self.metrics_path, self.steps_path = run_dir / "metrics.jsonl", run_dir / "steps.jsonl"
        self.tensorboard_path = run_dir / "tb"
        self.epochs = pick_events(read_events_until(self.metrics_path, metrics_bytes), "epoch")
        last_step = self.epochs[-1]["step"] if self.epochs else 0
        steps = read_events_until(self.steps_path, steps_bytes)
        self.step_losses = [get_loss(record) for record in steps if record["step"] > last_step]
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            disable=not enabled,
            mininterval=1.0 if sys.stderr.isatty() else 10.0,
        )
        if enabled:
            self.metrics_file = open_at(self.metrics_path, metrics_bytes)
            self.steps_file = open_at(self.steps_path, steps_bytes)
            purge_step = step + 1 if metrics_bytes else 0  # what a killed run wrote later is not shown
            with writing(self.tensorboard_path):
                self.tensorboard = SummaryWriter(self.tensorboard_path, purge_step=purge_step)

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, the point to cut back to."""
        return self.metrics_path.stat().st_size if self.enabled else 0

    @property
    def steps_bytes(self) -> int:
        """Length of steps.jsonl, the point to cut back to."""
        return self.steps_path.stat().st_size if self.enabled else 0

    def write(self, record: dict) -> None:
        """An event, as a line of metrics.jsonl."""
        if self.enabled:
            append(self.metrics_file, get_json_line(record))

    def write_steps(self, records: list[dict]) -> None:
        """Steps as lines of steps.jsonl: {"step", "epoch", "loss", "grad_norm", "lr"}.

        Called once in a while with the steps since the last call, so that the device is not waited for at
        every one. All of them are in the file when this returns.
        """
        self.step_losses += [record["loss"] for record in records]
        if not self.enabled or not records:
            return
        append(self.steps_file, "".join(get_json_line(record) for record in records))
        with writing(self.tensorboard_path):
            for record in records:
                for tag, field in STEP_SCALARS.items():
                    self.tensorboard.add_scalar(tag, record[field], record["step"])
            self.tensorboard.flush()

    def take_step_losses(self) -> list[float]:
        """The losses of the steps since the last epoch record, for the next one; they are forgotten here."""
        losses, self.step_losses = self.step_losses, []
        return losses

    def message(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def advance(self) -> None:
        """The progress bar moves by a step."""
        self.bar.update()

    def progress(self, phase: str, loss: float, images_per_second: float) -> None:
        """What stands beside the progress bar."""
        self.bar.set_postfix_str(f"{phase} loss {loss:.3f} {images_per_second:.0f} images/s", refresh=False)

    def warning(self, epoch: int, step: int, text: str) -> None:
        """A warning event, shown on the console too."""
        self.write({"event": "warning", "epoch": epoch, "step": step, "message": text})
        self.message(f"warning: {text}")

    def copy(self, record: dict) -> None:
        """An epoch or a switch of the run that this one was forked from."""
        self.write(record)
        if record["event"] == "epoch":
            self.epochs.append(record)
            self.scalars(record)

    def epoch(self, record: dict, heatmap: bool) -> None:
        """An epoch record. `heatmap`: draw the norm changes as well; now and then, for it takes 0.5 s."""
        self.epochs.append(record)
        self.write(record)
        self.scalars(record)
        if self.enabled and heatmap and len(self.epochs) > 1:
            with writing(self.tensorboard_path):
                figure = change_heatmap(self.epochs)
                self.tensorboard.add_figure("norm_change/layer_by_epoch", figure, record["step"])
        validation = ""
        if record["val_top1"] is not None:
            validation = f"val loss {record['val_loss']:.4f} top-1 {record['val_top1']:.2f}  "
        if "val_ema_top1" in record:
            validation += f"EMA top-1 {record['val_ema_top1']:.2f}  "
        self.message(
            f"epoch {record['epoch']:3d} {record['phase']:6s} train loss {record['train_loss']:.4f}  "
            f"{validation}{record['images_per_second']:.0f} images/s"
        )

    def scalars(self, record: dict) -> None:
        """An epoch record's numbers in TensorBoard."""
        if not self.enabled:
            return
        with writing(self.tensorboard_path):
            tensorboard, step = self.tensorboard, record["step"]
            for tag, field in EPOCH_SCALARS.items():
                if record.get(field) is not None:
                    tensorboard.add_scalar(tag, record[field], step)
            tensorboard.add_scalar(
                "perf/slowest_rank_step_seconds", record["slowest_rank"]["step_seconds"], step
            )
            self.norm_scalars("norm", record["weight_norms"], step)
            self.norm_scalars("adapter_norm", record["adapter_norms"], step)
            if len(self.epochs) == 1:
                tensorboard.add_custom_scalars(get_layout(record["weight_norms"]))
            tensorboard.flush()

    def norm_scalars(self, prefix: str, norms: dict[str, list[float]], step: int) -> None:
        """Each family's mean, and each of its layers."""
        for family, layers in norms.items():
            self.tensorboard.add_scalar(f"{prefix}/{family}", sum(layers) / len(layers), step)
            for i, value in enumerate(layers):
                self.tensorboard.add_scalar(f"{prefix}_by_layer/{family}/{i:02d}", value, step)

    def decided(self, s, signs: list[str], ranks: dict[str, list[int]] | None) -> None:
        """What an epoch's end has told: `signs` as warnings, and the ranks of the epoch to come. `s`: the
        State."""
        for sign in signs:
            self.warning(s.epoch, s.step, sign)
        if self.enabled and ranks != s.ranks:
            write_json(self.run_dir / "ranks.json", ranks)

    def switch(self, record: dict, signs: list[str]) -> None:
        """A switch event, with `signs` about its ranks as warnings; the ranks as a figure in TensorBoard."""
        for sign in signs:
            self.warning(record["epoch"], record["step"], sign)
        if self.enabled and record["ranks"]:
            write_json(self.run_dir / "ranks.json", record["ranks"])
        self.write(record)
        if self.enabled and record["ranks"]:
            with writing(self.tensorboard_path):
                self.tensorboard.add_figure("lora/ranks", rank_heatmap(record["ranks"]), record["step"])
        frozen = f", lowest {record['frozen_blocks']} blocks frozen" if record["frozen_blocks"] else ""
        self.message(
            f"switch {record['from']} -> {record['to']}{frozen} after epoch {record['epoch']}: "
            f"{record['trainable_params']:,} trainable parameters, {record['seconds']:.1f} s, "
            f"{record['graphs_compiled']} graphs compiled"
        )

    def get_trace_path(self, phase: str) -> Path | None:
        """Where this process is to write a trace of the phase; None if it has one or writes none."""
        if not self.enabled or phase in self.traced:
            return None
        self.traced.add(phase)
        return self.run_dir / "profile" / f"{phase}.json"

    def end(self, step: int, stopped: bool = False, signal: str | None = None) -> None:
        """The run's last words: by what it was `stopped`, if it was, and its phases side by side."""
        if stopped:
            who = signal or "another rank was told to stop"
            self.message(f"{who}: saved at step {step}, go on with --resume True")
        self.bar.close()
        if not self.enabled:
            return
        if self.epochs:
            print(phase_table(self.epochs))
        else:
            print(f"stopped at step {step}, before the first epoch's end")

    def close(self) -> None:
        """Close the files and the progress bar."""
        self.bar.close()
        if self.enabled:
            self.metrics_file.close()
            self.steps_file.close()
            with writing(self.tensorboard_path):
                self.tensorboard.close()


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """A full disk, or what else the machine refuses while `path` is written, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None


def open_at(path: Path, length: int) -> TextIO:
    """A file that is cut back to `length` bytes, to be written on from there; made if it is missing."""
    with writing(path):
        file = open(path, "a", encoding="utf-8")
        file.truncate(length)
    return file


def append(file: TextIO, text: str) -> None:
    """Write, and let nothing stay in a buffer."""
    with writing(file.name):
        try:
            file.write(text)
            file.flush()
        except OSError:
            # What is in the buffer would fail again, whenever the file is closed.
            with contextlib.suppress(OSError):
                file.close()
            raise


def get_json_line(record: dict) -> str:
    """The record as a line of a log."""
    return json.dumps(get_json_values(record), allow_nan=False) + "\n"


def get_json_values(value):
    """`value`, a record or what is in one, with None, JSON's null, for a float that is not finite: JSON has
    neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: get_json_values(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [get_json_values(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def get_loss(record: dict) -> float:
    """The loss of a line of steps.jsonl."""
    return math.nan if record["loss"] is None else record["loss"]


def get_layout(weight_norms: dict[str, list[float]]) -> dict:
    """TensorBoard's custom scalars: one chart per family with a line per layer."""
    charts = {family: ["Multiline", [f"norm_by_layer/{family}/.*"]] for family in weight_norms}
    return {"weight norm by layer": charts}
