"""Where a run writes what happens: metrics.jsonl, TensorBoard, the progress bar, the table at the end."""

import json
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from monitor.plot import change_heatmap, rank_heatmap


class RunLogger:
    """Writes one run's events. Silent when `enabled` is False (off rank 0).

    `keep_bytes`: metrics.jsonl is cut back to so many bytes (where the checkpoint that a run resumes from was saved);
    `step` and `total_steps` set the progress bar and TensorBoard's purge point. `epochs` holds the epoch records so far.
    """

    def __init__(self, run_dir: Path, step: int, total_steps: int, keep_bytes: int = 0, enabled: bool = True):
        self.enabled, self.path, self.epochs = enabled, run_dir / "metrics.jsonl", []
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05,
                        disable=not enabled, mininterval=1.0 if sys.stderr.isatty() else 10.0)
        if not enabled:
            return
        self.file = open(self.path, "a+")
        self.file.truncate(keep_bytes)
        self.file.seek(0)
        self.epochs = [e for e in map(json.loads, self.file) if e["event"] == "epoch"]
        self.tensorboard = SummaryWriter(run_dir / "tb", purge_step=step + 1 if keep_bytes else 0)  # what a killed run wrote later

    @property
    def bytes(self) -> int:
        """Length of metrics.jsonl, the point to cut back to."""
        return self.path.stat().st_size if self.enabled else 0

    def write(self, record: dict) -> None:
        if self.enabled:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def message(self, text: str) -> None:
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def advance(self) -> None:
        self.bar.update()

    def progress(self, phase: str, loss: float, images_per_second: float) -> None:
        self.bar.set_postfix_str(f"{phase} loss {loss:.3f} {images_per_second:.0f} images/s", refresh=False)

    def warning(self, epoch: int, step: int, text: str) -> None:
        self.write({"event": "warning", "epoch": epoch, "step": step, "message": text})
        self.message(f"warning: {text}")

    def copy(self, record: dict) -> None:
        """An epoch or a switch of the run that this one was forked from."""
        self.write(record)
        if record["event"] == "epoch":
            self.epochs.append(record)
            self.scalars(record)

    def epoch(self, record: dict, heatmap: bool) -> None:
        """An epoch record as in DESIGN's contract; `heatmap`: draw the layer × epoch norm changes (once in a while: it takes 0.5 s)."""
        self.epochs.append(record)
        self.write(record)
        self.scalars(record)
        if self.enabled and heatmap and len(self.epochs) > 1:
            self.tensorboard.add_figure("norm_change/layer_by_epoch", change_heatmap(self.epochs), record["step"])
        validation = "" if record["val_top1"] is None else f"val loss {record['val_loss']:.4f} top-1 {record['val_top1']:.2f}  "
        self.message(f"epoch {record['epoch']:3d} {record['phase']:6s} train loss {record['train_loss']:.4f}  {validation}"
                     f"{record['images_per_second']:.0f} images/s")

    def scalars(self, record: dict) -> None:
        if not self.enabled:
            return
        tb, step = self.tensorboard, record["step"]
        for tag, key in [("train/loss", "train_loss"), ("train/top1", "train_top1"), ("train/lr", "lr"), ("val/loss", "val_loss"),
                         ("val/top1", "val_top1"), ("val/top5", "val_top5"), ("perf/images_per_second", "images_per_second"),
                         ("perf/mfu", "mfu"), ("perf/data_wait_fraction", "data_wait_fraction"), ("perf/epoch_seconds", "epoch_seconds"),
                         ("perf/peak_memory_bytes", "peak_memory_bytes"), ("lora/trainable_params", "trainable_params")]:
            if record[key] is not None:
                tb.add_scalar(tag, record[key], step)
        tb.add_scalar("perf/slowest_rank_step_seconds", record["slowest_rank"]["step_seconds"], step)
        for prefix, norms in [("norm", record["weight_norms"]), ("adapter_norm", record["adapter_norms"])]:
            for family, layers in norms.items():
                tb.add_scalar(f"{prefix}/{family}", sum(layers) / len(layers), step)
                for i, value in enumerate(layers):
                    tb.add_scalar(f"{prefix}_by_layer/{family}/{i:02d}", value, step)
        if len(self.epochs) == 1:  # one chart per family with a line per layer, under TensorBoard's custom scalars
            tb.add_custom_scalars({"weight norm by layer": {family: ["Multiline", [f"norm_by_layer/{family}/.*"]]
                                                            for family in record["weight_norms"]}})
        tb.flush()

    def switch(self, record: dict) -> None:
        self.write(record)
        if self.enabled and record["ranks"]:
            self.tensorboard.add_figure("lora/ranks", rank_heatmap(record["ranks"]), record["step"])
        self.message(f"switch {record['from']} -> {record['to']} after epoch {record['epoch']}: {record['trainable_params']:,} "
                     f"trainable parameters, {record['seconds']:.1f} s, {record['graphs_compiled']} graphs compiled")

    def close(self) -> None:
        self.bar.close()
        if self.enabled:
            self.file.close()
            self.tensorboard.close()


def phase_table(epochs: list[dict]) -> str:
    """The run's phases side by side. Seconds and images/s are medians over the phase's epochs, memory the peak, top-1 the last one evaluated."""
    median = lambda values: sorted(values)[len(values) // 2]
    rows = [("phase", "epochs", "s/epoch", "images/s", "trainable", "peak memory", "top-1")]
    for phase in dict.fromkeys(e["phase"] for e in epochs):
        of = [e for e in epochs if e["phase"] == phase]
        top1 = [e["val_top1"] for e in of if e["val_top1"] is not None]
        rows.append((phase, str(len(of)), f"{median([e['epoch_seconds'] for e in of]):.1f}",
                     f"{median([e['images_per_second'] for e in of]):,.0f}", f"{of[-1]['trainable_params']:,}",
                     f"{max(e['peak_memory_bytes'] for e in of) / 2**30:.2f} GiB", f"{top1[-1]:.2f} %" if top1 else "-"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in rows)
