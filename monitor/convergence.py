"""When to switch: Algorithm 1 of PreLoRA (arXiv 2509.21619), the windows it looks at, and the signs of a bad switch."""

import math
from collections.abc import Sequence


def percent_change(new: float, old: float) -> float:
    """(new − old) / old · 100; 0 / 0 is no change. Raises ValueError for a value that is not finite: an error, not a pass."""
    if not (math.isfinite(new) and math.isfinite(old)):
        raise ValueError(f"a weight norm or loss is not finite: {old} -> {new}")
    if old == 0:
        return 0.0 if new == 0 else math.inf
    return (new - old) / old * 100


def partial_convergence_test(norms: dict[str, Sequence[float]], losses: Sequence[float], tau: float, zeta: float) -> bool:
    """Algorithm 1. `norms[family]` holds k window means of the weight norm (over epochs and layers), `losses` those of the loss.

    Passes when |ΔW_t^a| ≤ tau and |ΔL_t| ≤ zeta, in %, for every family a and every t = 2..k. Equality passes (the paper fails
    on >), also where rounding put it 1e-9 above.
    Raises ValueError for k < 2, no family, families of another length than the losses, or a value that is not finite.
    """
    if len(losses) < 2 or not norms or any(len(means) != len(losses) for means in norms.values()):
        raise ValueError("the partial convergence test needs at least two windows, the same ones for every family and the loss")
    within = lambda series, limit: all([abs(percent_change(new, old)) <= limit * (1 + 1e-9)
                                        for old, new in zip(series, series[1:])])
    # lists, not generators: every value is looked at, so that a NaN is an error wherever it stands
    return all([within(losses, zeta)] + [within(means, tau) for means in norms.values()])


class ConvergenceMonitor:
    """Collects one epoch at a time into windows of `window_epochs` and says when the switch is due.

    Windows are disjoint and start at epoch 0; one that begins before `skip_epochs` (the learning-rate warmup, in epochs) does
    not count for the test. The test runs when a window is full, over the last `num_windows` that count. With `switch_epoch` N
    the answer is simply yes once N epochs are in.
    Raises ValueError for fewer than two windows, or a `switch_epoch` before two windows are full (the ranks need two).
    """

    def __init__(self, tau: float, zeta: float, num_windows: int, window_epochs: int, skip_epochs: float = 0,
                 switch_epoch: int | None = None):
        if num_windows < 2 or window_epochs < 1:
            raise ValueError(f"the test compares windows: num_windows {num_windows} must be ≥ 2, window_epochs {window_epochs} ≥ 1")
        if switch_epoch is not None and switch_epoch < 2 * window_epochs:
            raise ValueError(f"switch_epoch {switch_epoch} is before two windows of {window_epochs} epochs are full: "
                             "the ranks come from the change between two (lower window_epochs)")
        self.tau, self.zeta, self.num_windows, self.window_epochs = tau, zeta, num_windows, window_epochs
        self.skip_epochs, self.switch_epoch = skip_epochs, switch_epoch
        self.epoch = 0  # epochs seen
        self.current: list[dict] = []  # the epochs of the window under way: {"norms": {family: [per layer]}, "loss": float}
        self.windows: list[dict] = []  # the last full windows' means, in the same form, with their first epoch as "start"

    def update(self, norms: dict[str, list[float]], loss: float) -> bool:
        """Take an epoch's weight norms ({family: [per layer]}) and mean training loss; True when the switch is due now.

        Raises FloatingPointError for a norm or loss that is not finite.
        """
        bad = [family for family, layers in norms.items() if not all(map(math.isfinite, layers))]
        if bad or not math.isfinite(loss):
            raise FloatingPointError(f"epoch {self.epoch + 1}: the {f'weight norms of {bad}' if bad else 'training loss'} are not finite")
        self.current.append({"norms": norms, "loss": loss})
        self.epoch += 1
        window_full = len(self.current) == self.window_epochs
        if window_full:
            mean = lambda values: math.fsum(values) / len(values)
            layers = {family: [mean(epochs) for epochs in zip(*(e["norms"][family] for e in self.current))] for family in norms}
            self.windows.append({"norms": layers, "loss": mean([e["loss"] for e in self.current]),
                                 "start": self.epoch - self.window_epochs})
            self.windows = self.windows[-self.num_windows:]
            self.current = []
        if self.switch_epoch is not None:
            return self.epoch >= self.switch_epoch
        valid = [w for w in self.windows if w["start"] >= self.skip_epochs]
        if not window_full or len(valid) < self.num_windows:
            return False
        family_means = {family: [sum(w["norms"][family]) / len(w["norms"][family]) for w in valid] for family in norms}
        return partial_convergence_test(family_means, [w["loss"] for w in valid], self.tau, self.zeta)

    def changes(self) -> dict[str, list[float]]:
        """ΔW_k^{a_l}: the change in % of each layer's norm between the last two full windows, Algorithm 2's input."""
        old, new = self.windows[-2:]
        return {family: [percent_change(n, o) for n, o in zip(layers, old["norms"][family])]
                for family, layers in new["norms"].items()}

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "current": list(self.current), "windows": list(self.windows)}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.current, self.windows = state["epoch"], list(state["current"]), list(state["windows"])


def replay(monitor: ConvergenceMonitor, epochs: list[dict], families: Sequence[str]) -> int | None:
    """Feed epoch records (of a full phase, from the first on) to `monitor` until the switch is due: after how many epochs, None = not yet.

    Raises ValueError for records without the norms of all `families`, FloatingPointError for values that are not finite.
    """
    for record in epochs:
        missing = [family for family in families if family not in record.get("weight_norms", {})]
        if missing:
            raise ValueError(f"epoch {record.get('epoch')} of the log has no weight norms of {', '.join(missing)}")
        if monitor.update({family: record["weight_norms"][family] for family in families}, record["train_loss"]):
            return record["epoch"]
    return None


def failure_signs(epochs: list[dict], window_epochs: int, zeta: float, baseline: list[dict] | None = None) -> list[str]:
    """What the paper's readers look for in the newest of a run's epoch records, as sentences; none is the good answer.

    A loss spike right after the freeze: the first LoRA epoch's training loss is more than 5 % above the epoch's before.
    With `baseline` (epoch records of a full run): a loss plateau above it, that is the LoRA phase's last two windows differ by
    zeta % at most while the last is more than 5 % above the baseline's at the same epochs.
    """
    signs = []
    now = epochs[-1]
    if len(epochs) > 1 and now["phase"] == "lora" != epochs[-2]["phase"]:
        before = epochs[-2]["train_loss"]
        if now["train_loss"] > 1.05 * before:
            signs.append(f"loss spike right after the freeze: {before:.4f} -> {now['train_loss']:.4f}; the warmup may be too short")
    lora = [e for e in epochs if e["phase"] == "lora"]
    if baseline and len(lora) >= 2 * window_epochs and len(lora) % window_epochs == 0:
        mean = lambda records: sum(e["train_loss"] for e in records) / len(records)
        last, previous = lora[-window_epochs:], lora[-2 * window_epochs:-window_epochs]
        same = [e for e in baseline if last[0]["epoch"] <= e["epoch"] <= last[-1]["epoch"]]
        if len(same) == window_epochs and abs(percent_change(mean(last), mean(previous))) <= zeta and mean(last) > 1.05 * mean(same):
            signs.append(f"loss plateau above the baseline: {mean(last):.4f} against {mean(same):.4f} over epochs {last[0]['epoch']}-"
                         f"{last[-1]['epoch']}; the switch may have come too early")
    return signs


def rank_signs(ranks: dict[str, list[int]], rank_min: int, rank_max: int, minmax: bool = True) -> list[str]:
    """Warnings about assigned ranks: nearly every layer at rank_max saves nothing; with Algorithm 2 (`minmax`), a family of equal layers
    got rank_min."""
    if rank_min == rank_max:  # asked for
        return []
    everything = [r for layers in ranks.values() for r in layers]
    at_max = sum(r == rank_max for r in everything) / len(everything)
    signs = []
    if at_max >= 0.9:
        signs.append(f"{at_max:.0%} of the layers are at rank_max {rank_max}: the adapters save little")
    for family, layers in ranks.items():
        if minmax and len(layers) > 1 and set(layers) == {rank_min}:  # otherwise the largest change gets rank_max
            signs.append(f"every layer of {family} changed alike: all at rank {rank_min}")
    return signs
