"""Arms of an experiment: runs that differ in nothing but their seed belong together."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from monitor.figures import COLORS, DASHES
from monitor.log import get_stage, pick_events

# Config fields that make no other experiment: runs that differ in these alone are seeds of one arm.
# fmt: off
IGNORED = {
    "run_dir", "resume", "seed", "max_steps", "keep_every", "eval_every", "baseline", "fork", "loader",
    "num_workers", "stage_dir", "fresh_head", "log_displacement",
}
# fmt: on
SEED_NAME = r"(s|seed)?[-_.]?\d+"  # seed0, s10, 3: directories named so tell seeds apart, not experiments


class Arm(NamedTuple):
    """One experiment: runs that differ in nothing but the seed (and IGNORED)."""

    label: str
    config: dict
    runs: list[list[dict]]  # the epoch records of each
    style: dict  # of its lines
    devices: set[str]  # that its runs were on: cpu, cuda
    flops: dict[str, int]  # phase or FROZEN → FLOPs per image


def group_runs(runs: list[tuple[Path, dict, list[dict]]]) -> tuple[Arm | None, list[Arm]]:
    """Sort runs into arms: [(directory, config, events)] → (baseline or None, the other arms in order of
    their first runs).

    Runs are seeds of one arm when their configs are equal but for IGNORED; a field that is None is as one
    that is absent (runs older than a field lack it). The baseline is the arm with mode "full" that freezes
    nothing, of several the one with most epochs. A label is what the names of an arm's directories begin
    with, or their parent's name for names like seed0.
    """
    groups: dict[str, list] = {}
    for run, config, events in runs:
        groups.setdefault(get_experiment(config), []).append((Path(os.path.abspath(run)), config, events))
    labels = [get_label([run for run, _, _ in group]) for group in groups.values()]
    top = get_common_parent([run for run, _, _ in runs])
    arms = []
    for group, label in zip(groups.values(), labels):
        if labels.count(label) > 1:
            label = os.path.relpath(group[0][0], top)
        arms.append(build_arm(label, group))
    full = [a for a in arms if a.config.get("mode") == "full" and not a.config.get("freeze_blocks")]
    baseline = max(full, key=lambda arm: max(map(len, arm.runs)), default=None)
    arms = [arm for arm in arms if arm is not baseline]
    for i, arm in enumerate(arms):  # six colours: black is the baseline's, yellow too faint
        arm.style.update(color=COLORS[i % 6], linestyle=DASHES[i // 6 % len(DASHES)])
    if baseline:
        baseline.style.update(color="black", linestyle="-")
    return baseline, arms


def find_window_arms(arms: list[Arm]) -> list[Arm]:
    """The largest set of arms whose configs are equal but for lora_warmup_epochs (and IGNORED), labelled
    "w = 5" and in its order; [] when no two are.
    """
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.config.get("mode") not in ("full", "lora") and "lora_warmup_epochs" in arm.config:
            groups.setdefault(get_experiment(arm.config, "lora_warmup_epochs"), []).append(arm)
    largest = max(groups.values(), key=len, default=[])
    if len(largest) < 2:
        return []
    largest = sorted(largest, key=lambda arm: arm.config["lora_warmup_epochs"])
    return [arm._replace(label=f"w = {arm.config['lora_warmup_epochs']}") for arm in largest]


def build_arm(label: str, group: list[tuple[Path, dict, list[dict]]]) -> Arm:
    """The arm of these runs, its style still to be chosen."""
    events = [event for _, _, run_events in group for event in run_events]
    flops = {}
    for event in events:
        if "flops_per_image" in event:
            phase = event.get("to") or event.get("phase")  # of a switch, of a start
            flops[get_stage(event | {"phase": phase})] = event["flops_per_image"]
    devices = {event.get("device") for event in pick_events(events, "start")}
    runs = [pick_events(run_events, "epoch") for _, _, run_events in group]
    return Arm(label, group[0][1], runs, {}, devices, flops)


def get_experiment(config: dict, *ignored: str) -> str:
    """What tells two experiments apart, as a string: the config without IGNORED and `ignored`."""
    skipped = {*IGNORED, *ignored}
    kept = {name: value for name, value in config.items() if value is not None and name not in skipped}
    return json.dumps(kept, sort_keys=True)


def get_label(runs: list[Path]) -> str:
    """What the names of an arm's directories begin with."""
    names = [run.name for run in runs]
    if all(re.fullmatch(SEED_NAME, name) for name in names):  # study/exp1/seed0
        names = [run.parent.name for run in runs]
    label = os.path.commonprefix(names)
    # The prefix may end in what they share of a seed: exp1-seed1 of exp1-seed10 and exp1-seed11.
    if len(set(names)) > 1:
        label = re.sub(r"(^|[-_.])(s|seed)?[-_.]?\d*$", "", label)
    return label or names[0]


def get_common_parent(runs: list[Path]) -> Path:
    """The folder in which all of these run directories lie."""
    return Path(os.path.commonpath([os.path.abspath(Path(run).parent) for run in runs]))
