"""Tables and figures of docs/method.md. `python study.py` trains the runs, and writes these with its own
report.

When to switch: the arm `best` of study_runs.py is switched at every window's end of the baseline of the same
seed. The gain of that is its top-1 minus that of all parameters trained for as long as it took, by the step
costs of docs/study.md, between whole epochs by straight lines. A rule's regret is the gain that it missed, by
its own switch, of the best window's; never to switch gains 0.

Which ranks: the same arm, switched at 14, with each rank rule at the same number of parameters.
"""

import dataclasses
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from errors import UserError
from files import read_json, write_json
from monitor.convergence import find_switch
from monitor.figures import build_figure
from monitor.forecast import measure_shortfall
from monitor.log import get_stage, load_run, pick_events, read_events
from start import get_rates
from study_oracle import ORACLE_SEEDS, RULES, compute_rules
from study_runs import (
    BASELINE,
    BEST_ARM,
    EQUAL,
    KEPT,
    MAIN_FORKS,
    OPTIONS,
    RULE_ARMS,
    WINDOWS,
    Arm,
    get_config,
    get_kept,
    load_arm,
    round_floats,
)

DOC = Path("docs/method.md")
MARKS = ("<!-- written by study.py: {} -->", "<!-- end: {} -->")
ALSO = [arm for arm in (*MAIN_FORKS, *OPTIONS) if arm.name in ("best10", "best12", "best")]
SWITCHED = {int(arm.flags.split()[1]): arm for arm in (*ALSO, *WINDOWS)}  # by their --switch_epoch
SWITCHED = dict(sorted(SWITCHED.items()))
SEEDS = BEST_ARM.seeds
THRESHOLDS = {  # in %
    "Algorithm 1, the paper's Exp1": (1.0, 5.0),
    "Algorithm 1, the paper's Exp2": (0.5, 2.5),
    "Algorithm 1, the paper's Exp3": (0.25, 1.0),
    "Algorithm 1, Exp1 for this schedule": (0.3, 15.0),
    "Algorithm 1, Exp2 for this schedule": (0.25, 10.0),
}
FORKED_AT = (8, 10, 12, 14, 16)  # of forks that calibrate the forecast


# ------------------------------------------------------------------------------------------------------------
# when to switch


def get_top1(arm: Arm, seed: int) -> float:
    """Top-1 in % on the held-out images."""
    return pick_events(read_events(get_kept(arm, seed) / "metrics.jsonl"), "held_out")[0]["val_top1"]


def get_cost(epochs: list[dict], costs: dict[str, float]) -> float:
    """Of these epochs, in epochs with all parameters."""
    return sum(costs[get_stage(record)] for record in epochs)


def get_equal(seed: int, cost: float) -> float:
    """Top-1 of all parameters trained for so many epochs, between the seed's own runs of 21 to 24."""
    by_epochs = {load_run(get_kept(arm, seed)).config["epochs"]: arm for arm in (BASELINE, *EQUAL)}
    epochs = sorted(by_epochs)
    return float(np.interp(cost, epochs, [get_top1(by_epochs[count], seed) for count in epochs]))


def get_gains(costs: dict[str, float]) -> dict[int, np.ndarray]:
    """{switch epoch: each seed's top-1 minus that of equal time}."""
    gains = {}
    for epoch, arm in SWITCHED.items():
        own = []
        for seed, run in enumerate(load_arm(arm)):
            own.append(get_top1(arm, seed) - get_equal(seed, get_cost(run.epochs, costs)))
        gains[epoch] = np.array(own)
    return gains


def get_shortfalls() -> dict[int, np.ndarray]:
    """{switch epoch: the shortfall that each seed's fork calibrates}, of switches that leave two windows of
    adapters."""
    shortfalls = {}
    for epoch, arm in SWITCHED.items():
        if epoch > 18:
            continue
        runs = [
            (run.epochs, load_run(get_kept(BASELINE, seed)).epochs) for seed, run in enumerate(load_arm(arm))
        ]
        shortfalls[epoch] = np.array([measure_shortfall(fork, full, window_epochs=2) for fork, full in runs])
    return shortfalls


def get_choices(costs: dict[str, float]) -> dict[str, list[int | None]]:
    """{rule: after which epoch it would have switched, of each seed; None: never}, from the baselines'
    logs."""
    shortfalls, choices = get_shortfalls(), {}
    for name, (tau, zeta) in THRESHOLDS.items():
        choices[name] = [choose(seed, costs, tau=tau, zeta=zeta) for seed in range(SEEDS)]
    for at in FORKED_AT:
        own = []
        for seed in range(SEEDS):
            other = (seed + 1) % SEEDS  # no run is judged by its own fork
            shortfall = float(shortfalls[at][other])
            own.append(choose(seed, costs, switch_rule="forecast", forecast_shortfall=shortfall))
        choices[f"forecast, calibrated by another seed's fork at {at}"] = own
    return choices


def choose(seed: int, costs: dict[str, float], **rule) -> int | None:
    """After which epoch but the last a run of this `rule` would have switched, if its full phase was the
    baseline's."""
    run = load_run(get_kept(BEST_ARM, seed))
    cfg = dataclasses.replace(get_config(BEST_ARM, run), switch_epoch=None, fork=None)
    cfg = dataclasses.replace(cfg, warmup_cost=costs["warmup"], lora_cost=costs["lora"], **rule)
    return find_switch(load_run(get_kept(BASELINE, seed)).epochs[:-1], cfg, get_rates)


def get_interval(values: np.ndarray) -> str:
    """Mean and its 95 % interval, by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():+.2f} [{values.mean() - half:+.2f}, {values.mean() + half:+.2f}]"


def get_rule_gains(gains: dict[int, np.ndarray], choices: list[int | None]) -> np.ndarray:
    """Of each seed, where a rule switched; 0 where it did not. Raises UserError where no run did that."""
    own = []
    for seed, epoch in enumerate(choices):
        if epoch is not None and epoch not in gains:
            raise UserError(f"a rule switches after epoch {epoch}, and no arm of the study does")
        own.append(0.0 if epoch is None else gains[epoch][seed])
    return np.array(own)


def get_window_table(gains: dict[int, np.ndarray], costs: dict[str, float]) -> str:
    """What a switch at each window's end brings, in Markdown."""
    shortfalls = get_shortfalls()
    lines = ["| switch after | top-1 % | cost | − equal time [95 %] | shortfall |"]
    lines.append("|---|---|---|---|---|")
    for epoch, arm in SWITCHED.items():
        top1 = np.mean([get_top1(arm, seed) for seed in range(SEEDS)])
        cost = get_cost(load_run(get_kept(arm, 0)).epochs, costs)
        shortfall = ""
        if epoch in shortfalls:
            low, high = shortfalls[epoch].min(), shortfalls[epoch].max()
            shortfall = f"{shortfalls[epoch].mean():.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {epoch} | {top1:.2f} | {cost:.2f} | {get_interval(gains[epoch])} | {shortfall} |")
    never = np.mean([get_top1(BASELINE, seed) for seed in range(SEEDS)])
    return "\n".join([*lines, f"| never | {never:.2f} | 24.00 | 0 |  |"])


def get_rule_table(gains: dict[int, np.ndarray], choices: dict[str, list[int | None]]) -> str:
    """What each rule would have done, and its regret, in Markdown."""
    per_seed = np.array([*gains.values(), np.zeros(SEEDS)]).max(axis=0)
    fixed = max([*gains.values(), np.zeros(SEEDS)], key=np.mean)
    titles = ["rule", "switches after, seeds 0 to 4", "gain over equal time [95 %]"]
    titles += ["regret, to the best fixed window [95 %]", "to each seed's best"]
    lines = [f"| {' | '.join(titles)} |"]
    lines.append("|---|---|---|---|---|")
    for name, epochs in choices.items():
        own = get_rule_gains(gains, epochs)
        told = ", ".join("never" if epoch is None else str(epoch) for epoch in epochs)
        regrets = f"{get_interval(fixed - own)} | {(per_seed - own).mean():.2f}"
        lines.append(f"| {name} | {told} | {get_interval(own)} | {regrets} |")
    return "\n".join(lines)


def build_gain_figure(gains: dict[int, np.ndarray], choices: dict[str, list[int | None]]) -> Figure:
    """The gain of a switch at each window's end, mean and each seed's; and below where the rules that ever
    switch would have done so."""
    figure = build_figure(7, 6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    epochs = list(gains)
    for seed in range(SEEDS):
        top.plot(epochs, [gains[epoch][seed] for epoch in epochs], color="0.8", linewidth=1)
    means = np.array([gains[epoch].mean() for epoch in epochs])
    half = [stats.t.ppf(0.975, SEEDS - 1) * stats.sem(gains[epoch]) for epoch in epochs]
    top.errorbar(epochs, means, half, marker="o", capsize=3, label="mean of 5 seeds, 95 %")
    top.axhline(0, color="black", linestyle="--", label="all parameters in equal time")
    top.set(ylabel="top-1 minus equal time, points", title="What a switch gains, by its epoch")
    top.legend(frameon=False)
    rules = [name for name, switches in choices.items() if any(switches)]
    for row, name in enumerate(rules):
        switches = [epoch for epoch in choices[name] if epoch is not None]
        counts = {epoch: switches.count(epoch) for epoch in switches}
        bottom.scatter(list(counts), [row] * len(counts), s=[40 * count for count in counts.values()])
    bottom.set_yticks(range(len(rules)), rules, fontsize=8)
    bottom.set_ylim(len(rules) - 0.5, -0.5)
    bottom.set(xlabel="switch after epoch", xticks=epochs)
    return figure


# ------------------------------------------------------------------------------------------------------------
# which ranks


def get_rules() -> dict[str, dict[str, list[float]]]:
    """`compute_rules`'s, once computed kept in docs/study/runs/rules.json."""
    path = KEPT / "rules.json"
    if not path.exists():
        print("comparing rank rules with what the baselines did …", flush=True)
        write_json(path, round_floats(compute_rules(BEST_ARM, ORACLE_SEEDS)))
    return read_json(path)


def get_trained(rule: str) -> np.ndarray:
    """Top-1 of the runs with ranks by that rule, of each seed that all rules have."""
    seeds = min(arm.seeds for arm in RULE_ARMS.values())
    return np.array([get_top1(RULE_ARMS[rule], seed) for seed in range(seeds)])


def get_rank_table(rules: dict[str, dict[str, list[float]]]) -> str:
    """The rank rules beside each other, in Markdown."""
    titles = ["ranks by", "adapter parameters", "% of the rest's σ²", "cut to these ranks, top-1 %"]
    titles += ["trained, top-1 %", "− minmax [95 %]"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for rule, found in rules.items():
        cells = [RULES[rule], f"{np.mean(found['parameters']):,.0f}", f"{100 * np.mean(found['share']):.1f}"]
        cells += [f"{np.mean(found['top1']):.2f}", "", ""]
        if rule in RULE_ARMS:
            cells[4] = f"{get_trained(rule).mean():.2f}"
        if rule in RULE_ARMS and rule != "minmax":
            cells[5] = get_interval(get_trained(rule) - get_trained("minmax"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def build_rank_figure(rules: dict[str, dict[str, list[float]]]) -> Figure:
    """What each rule's ranks can hold of what the rest of training did, and what training with them gave."""
    figure = build_figure(9, 3.5)
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(rules)
    left.barh(range(len(names)), [100 * np.mean(rules[name]["share"]) for name in names])
    left.set_yticks(range(len(names)), [RULES[name] for name in names], fontsize=8)
    left.set(xlabel="% of the rest's σ² that the ranks hold", ylim=(len(names) - 0.5, -0.5))
    for row, name in enumerate(names):
        if name in RULE_ARMS:
            differences = get_trained(name) - get_trained("minmax")
            right.plot(differences, [row] * len(differences), "o", color="0.7", markersize=4)
            right.plot(differences.mean(), row, "D", color="black")
    right.axvline(0, color="black", linestyle="--")
    right.set(xlabel="top-1 minus that with Algorithm 2's ranks, points")
    right.locator_params(axis="x", nbins=5)
    return figure


# ------------------------------------------------------------------------------------------------------------
# the report


def put_between(text: str, what: str, tables: str) -> str:
    """`text` with these tables between the marks of `what`. Raises UserError where DOC has lost them."""
    begin, end = (mark.format(what) for mark in MARKS)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{DOC} has lost the marks between which tables go: {begin} {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{tables}\n{end}{rest.split(end)[1]}"


def write_report(costs: dict[str, float]) -> None:
    """Write the tables between the marks of DOC, and its figures. `costs`: of the arm's steps, in full
    ones."""
    gains, choices, rules = get_gains(costs), get_choices(costs), get_rules()
    tables = f"{get_window_table(gains, costs)}\n\n{get_rule_table(gains, choices)}"
    text = put_between(DOC.read_text(), "when to switch", tables)
    DOC.write_text(put_between(text, "which ranks", get_rank_table(rules)))
    folder = DOC.with_suffix("")
    folder.mkdir(exist_ok=True)
    build_gain_figure(gains, choices).savefig(folder / "switch.png")
    build_rank_figure(rules).savefig(folder / "ranks.png")
    print(f"wrote {DOC}")
