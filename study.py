"""The study: does a switch pay? The paper's experiments, what is new here, and their controls, on
Fashion-MNIST, in under three hours on 2 CPU cores.

    python study.py              trains what is still missing, then writes the report
    python study.py --report     writes the report only: figures to docs/study/, tables between the marks in
                                 docs/study.md

One process a core, one thread each. Every arm is train.py with a preset and flags. Arms that differ only
after the switch are forked from the baseline of the same seed, whose epochs up to there count as theirs.

A run that is done leaves a few kB of its log in docs/study/runs/, which is in git: it is not trained again,
there or elsewhere. Those that are not done go on where they stood, under runs/study. Settings are chosen by
the top-1 on 10,000 images (`dev`) and reported on 54,000 others, on which no run has trained either.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

import replay
import study_method
import train
from benchmarks.choices import describe_device, get_ranks, repeat_noise
from benchmarks.contenders import build_contender
from benchmarks.roofline import count_kernels, get_ceilings, seconds_by_kind
from errors import UserError
from files import read_json, write_json
from lora.ranks import Ranks
from monitor.figures import build_figure
from monitor.log import FROZEN, Run, find_first_switch, get_stage, load_run, pick_events, read_events
from monitor.plot import plot_runs
from start import get_static_ranks
from study_oracle import ORACLE_SEEDS, compute_oracle
from study_runs import (
    ARMS,
    BASELINE,
    BEST_ARM,
    DECAYS,
    DRAWN,
    EQUAL,
    FORKS,
    KEPT,
    MAIN,
    MAIN_FORKS,
    RUNS,
    Arm,
    get_config,
    get_kept,
    load_arm,
    prepare_data,
    round_floats,
    train_all,
)

ROOT, DOC = Path(__file__).parent, Path("docs/study.md")
MARKS = ("<!-- written by study.py -->", "<!-- end -->")


# ------------------------------------------------------------------------------------------------------------
# what an epoch takes


def get_stages(run: Run) -> list[str]:
    """The stages of a run, in order."""
    return list(dict.fromkeys(map(get_stage, run.epochs)))


def get_arm_ranks(cfg: train.Config, run: Run) -> Ranks | None:
    """The ranks of a run; None without adapters."""
    if cfg.mode == "lora":
        return get_static_ranks(cfg, train.build_net(cfg))
    switch = find_first_switch(run.switches)
    return switch["ranks"] if switch else None


def build_step(cfg: train.Config, stage: str, ranks: Ranks | None) -> Callable[[], None]:
    """A function that takes train.py's own step in that stage, on noise."""
    device = torch.device("cpu")
    batches = repeat_noise(cfg.dataset, cfg.batch_size // cfg.grad_accum_steps, device, cfg.image_size)
    return build_contender(stage, cfg, ranks, device, batches).step


def measure_costs(rounds: int = 31) -> dict[str, dict[str, float]]:
    """{arm: {stage: its step in full steps}}, with the ranks of the arm's first run: medians of steps that
    take turns, on one core, so that what else the machine does costs all of them the same."""
    torch.set_num_threads(1)
    steps: dict[tuple[str, str], Callable] = {}
    for arm in ARMS:
        run = load_run(get_kept(arm, 0))
        cfg = get_config(arm, run)
        for stage in get_stages(run):
            if stage != "full" or arm is BASELINE:
                steps[arm.name, stage] = build_step(cfg, stage, get_arm_ranks(cfg, run))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(rounds + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - start)
    medians = {key: float(np.median(values[1:])) for key, values in times.items()}  # the first allocates
    return divide_by_full(medians) | {"milliseconds": {"full": 1e3 * medians[BASELINE.name, "full"]}}


def count_costs() -> dict[str, dict[str, float]]:
    """The same by the roofline of an A100: ViT-L/16's steps, 64 images, bfloat16, ranks of 8 to 64, with as
    large a share of the blocks frozen. Arms of one kind of step share a count."""
    seconds: dict[tuple[str, str], float] = {}
    counted: dict[tuple, float] = {}
    ceilings = get_ceilings("a100-40gb")
    for arm in ARMS:
        run = load_run(get_kept(arm, 0))
        own = get_config(arm, run)
        for stage in get_stages(run):
            frozen = own.freeze_blocks * 8 if stage in ("lora", FROZEN) else 0  # of 24 blocks, where it has 3
            trainable = own.mode if own.mode == "lora" else own.lora_trainable
            key = (stage, frozen, trainable if stage == "lora" else "")
            if key not in counted:
                cfg = train.Config(model="L/16", dataset="imagenet", batch_size=64, freeze_blocks=frozen)
                cfg = dataclasses.replace(cfg, mode=own.mode, lora_trainable=own.lora_trainable)
                ranks = {f: [0] * frozen + of[frozen:] for f, of in get_ranks("mixed", "L/16").items()}
                kernels = count_kernels(cfg, stage, ranks, 64)
                counted[key] = sum(seconds_by_kind(kernels, ceilings).values())
            seconds[arm.name, stage] = counted[key]
    return divide_by_full(seconds)


def divide_by_full(seconds: dict[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    """{arm: {stage: seconds of the baseline's full step}}."""
    costs: dict[str, dict[str, float]] = {arm.name: {"full": 1.0} for arm in ARMS}
    for (name, stage), value in seconds.items():
        costs[name][stage] = value / seconds[BASELINE.name, "full"]
    return costs


def get_costs() -> dict[str, dict]:
    """Both costs, measured and counted once, and kept in docs/study/runs/costs.json with the machine's name.
    What an arm lacks there is measured anew, with all others."""
    path = KEPT / "costs.json"
    if not path.exists() or any(arm.name not in read_json(path)["measured"] for arm in ARMS):
        print("timing the stages of all arms side by side …", flush=True)
        costs = {"measured": measure_costs(), "a100": count_costs(), "machine": describe_device()}
        write_json(path, round_floats(costs))
    return read_json(path)


def get_full_epochs(run: Run, costs: dict[str, float]) -> float:
    """What a run's epochs cost, in epochs with all parameters. Not counted, and the same for all: reading
    data, evaluation, saving, starting; nor the switches, a second or less."""
    return sum(costs[get_stage(record)] for record in run.epochs)


# ------------------------------------------------------------------------------------------------------------
# what came out


def get_interval(values: np.ndarray) -> str:
    """Mean and its 95 % interval, by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():+.2f} [{values.mean() - half:+.2f}, {values.mean() + half:+.2f}]"


def get_top1(arm: Arm) -> np.ndarray:
    """Top-1 in % on the held-out images, of each seed."""
    return np.array([get_held_out(arm, seed)["val_top1"] for seed in range(arm.seeds)])


def get_held_out(arm: Arm, seed: int) -> dict:
    return pick_events(read_events(get_kept(arm, seed) / "metrics.jsonl"), "held_out")[0]


def get_dev(arm: Arm) -> np.ndarray:
    """Top-1 in % on the images by which settings were chosen."""
    return np.array([run.epochs[-1]["val_top1"] for run in load_arm(arm)])


def get_controls(arm: Arm, costs: dict[str, float]) -> np.ndarray | None:
    """Of each seed the top-1 of all parameters trained for no less time than that seed's run took: for its
    cost, rounded up to whole epochs. None where that is not among the controls."""
    controls = {}
    for control in (BASELINE, *EQUAL):
        controls[load_run(get_kept(control, 0)).config["epochs"]] = get_top1(control)
    values = []
    for seed, run in enumerate(load_arm(arm)):
        epochs = math.ceil(get_full_epochs(run, costs) - 1e-6)
        if epochs not in controls or seed >= len(controls[epochs]):
            return None
        values.append(controls[epochs][seed])
    return np.array(values)


def get_table() -> str:
    """The arms beside each other, a row each, in Markdown."""
    titles = ["arm", "seeds", "switch after", "top-1 %", "− baseline [95 %]", "dev %"]
    titles += ["cost", "− equal time [95 %]", "A100 cost", "− equal time there [95 %]", "LoRA step"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    costs = get_costs()
    return "\n".join(lines + [f"| {' | '.join(get_row(arm, costs))} |" for arm in ARMS])


def get_row(arm: Arm, costs: dict[str, dict]) -> list[str]:
    """An arm's cells of the table."""
    runs, top1 = load_arm(arm), get_top1(arm)
    switches = [find_first_switch(run.switches) for run in runs]
    switched = sorted({switch["epoch"] for switch in switches if switch})
    cells = [arm.text, str(len(runs)), ", ".join(map(str, switched))]
    cells += [f"{top1.mean():.2f} ± {top1.std(ddof=1):.2f}"]
    cells += [get_interval(top1 - get_top1(BASELINE)[: len(top1)]) if arm is not BASELINE else ""]
    cells += [f"{get_dev(arm).mean():.2f}"]
    for kind in ("measured", "a100"):
        own = costs[kind][arm.name]
        cells.append(f"{np.mean([get_full_epochs(run, own) for run in runs]):.2f}")
        controls = None if arm is BASELINE or arm in [*EQUAL, *DECAYS] else get_controls(arm, own)
        cells.append("" if controls is None else get_interval(top1 - controls))
    lora = costs["measured"][arm.name].get("lora")
    return [*cells, f"{lora:.2f}" if lora else ""]


def compare_decays() -> str:
    """The main arms against all parameters trained at the LoRA phase's own learning rates, in Markdown: the
    control of the decay, where the others are of the time."""
    controls = [arm for arm in DECAYS if arm.seeds == BASELINE.seeds]
    lines = [f"| top-1 minus that of | {' | '.join(arm.text for arm in controls)} |"]
    lines.append("|---" * (1 + len(controls)) + "|")
    for arm in MAIN_FORKS:
        differences = [get_interval(get_top1(arm) - get_top1(control)) for control in controls]
        lines.append(f"| {arm.text} | {' | '.join(differences)} |")
    return "\n".join(lines)


def check_replay() -> str:
    """Whether replay.py, given the baseline's log and an arm's settings, names the epoch and the ranks of
    what the arm's run did."""
    agree, total = 0, 0
    for arm in FORKS:
        for seed, run in enumerate(load_arm(arm)):
            cfg = get_config(arm, run)
            if cfg.mode != "prelora":  # it never switches
                continue
            told = replay.replay_run(cfg, load_run(get_kept(BASELINE, seed)).epochs)
            switch = find_first_switch(run.switches)
            did = (switch["epoch"], switch["ranks"]) if switch else (None, None)
            agree, total = agree + (told == did), total + 1
    return (
        f"Replayed from the baselines' logs, {agree} of {total} forked runs switch at the epoch and with the "
        "ranks that they did."
    )


# ------------------------------------------------------------------------------------------------------------
# from the baseline's checkpoints, computed once and kept


def get_oracle() -> dict:
    """`compute_oracle`'s, once computed kept in docs/study/runs/oracle.json."""
    path = KEPT / "oracle.json"
    if not path.exists():
        print("evaluating means and low-rank parts of the baselines' weights …", flush=True)
        write_json(path, round_floats(compute_oracle()))
    return read_json(path)


# ------------------------------------------------------------------------------------------------------------
# the report


def read_doc() -> tuple[str, str]:
    """What stands before and behind the marks in DOC. Raises UserError if it has lost them."""
    try:
        text = DOC.read_text()
    except OSError as error:
        raise UserError(f"{DOC} can't be read: {error.strerror}") from None
    if text.count(MARKS[0]) != 1 or text.count(MARKS[1]) != 1:
        raise UserError(f"{DOC} has lost the marks between which the tables go: {' '.join(MARKS)}")
    before, rest = text.split(MARKS[0])
    return before, rest.split(MARKS[1])[1]


def get_mean_table() -> str:
    """The means of a baseline's weights, and the oracle, in Markdown."""
    found, lines = get_oracle(), ["| weights of the baseline | top-1 % |", "|---|---|"]
    for name, top1 in found["means"].items():
        lines.append(f"| {name} | {np.mean(top1):.2f} |")
    for rank, top1 in found["oracle"].items():
        lines.append(f"| after 14 and the rank-{rank} part of the rest | {np.mean(top1):.2f} |")
    return "\n".join(lines)


def write_report() -> None:
    """Write the tables between the marks of DOC, and the figures beside it."""
    before, after = read_doc()
    costs = get_costs()
    full = costs["measured"]["milliseconds"]["full"]
    tables = [
        get_table(),
        f"Costs are in epochs with all parameters, whose step takes {full:.0f} ms here ({costs['machine']}). "
        f"{check_replay()}",
        compare_decays(),
        f"Without training, seeds {', '.join(map(str, ORACLE_SEEDS))}:\n\n{get_mean_table()}",
    ]
    DOC.write_text(before + MARKS[0] + "\n" + "\n\n".join(tables) + "\n" + MARKS[1] + after)
    print(f"wrote {DOC}")
    draw_figures()
    study_method.write_report(costs["measured"][BEST_ARM.name])


def draw_figures() -> None:
    """The paper's figures from these runs, the oracle, and how far the steps of each phase go."""
    out = DOC.with_suffix("")
    drawn = [arm for arm in ARMS if arm.name in DRAWN]
    runs = [str(copy_with_seconds(arm, seed)) for arm in drawn for seed in range(arm.seeds)]
    plot_runs(runs, family=None, out=str(out))
    timed = RUNS / "timed"
    for name, figure in ((MAIN, "figure1"), (BASELINE.name, "figure3"), (MAIN, "ranks")):
        shutil.copy(timed / f"{name}-0/figures/{figure}.png", out)
    for name in (BASELINE.name, MAIN):
        shutil.copy(timed / f"{name}-0/figures/displacement.png", out / f"displacement_{name}.png")
    oracle = build_oracle_figure(get_oracle()["oracle"], get_top1(BASELINE)[list(ORACLE_SEEDS)])
    oracle.savefig(out / "oracle.png")


def build_oracle_figure(oracle: dict[str, list[float]], baseline: np.ndarray) -> Figure:
    """Top-1 of the baseline's weights whose last epochs are cut to a rank, beside the whole: mean and range
    over seeds."""
    figure = build_figure(6, 4)
    axes = figure.subplots()
    ranks, top1 = [int(rank) for rank in oracle], np.array(list(oracle.values()))  # (ranks, seeds)
    spread = np.stack([top1.mean(1) - top1.min(1), top1.max(1) - top1.mean(1)])
    axes.errorbar(
        ranks, top1.mean(1), spread, marker="o", capsize=3, label="its last ten epochs cut to a rank"
    )
    axes.axhline(baseline.mean(), color="black", linestyle="--", label="all parameters, 24 epochs")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, ranks)
    axes.set(xlabel="rank of each layer's change after epoch 14", ylabel="top-1 %", title="The oracle")
    axes.legend(frameon=False)
    return figure


def copy_with_seconds(arm: Arm, seed: int) -> Path:
    """A copy of a kept log for the figures, its epochs' seconds and images/s those measured side by side, as
    in the table."""
    source, costs = get_kept(arm, seed), get_costs()["measured"]
    batch_size = load_run(source).config["batch_size"]
    copy = RUNS / "timed" / source.name
    copy.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", copy)
    with open(copy / "metrics.jsonl", "w") as out:
        for record in read_events(source / "metrics.jsonl"):
            if record["event"] == "epoch":
                images = record["epoch_seconds"] * record["images_per_second"]
                steps = images / batch_size
                step = costs["milliseconds"]["full"] / 1e3 * costs[arm.name][get_stage(record)]
                record["epoch_seconds"] = step * steps
                record["images_per_second"] = images / record["epoch_seconds"]
            out.write(json.dumps(record) + "\n")
    return copy


def main(argv: list[str]) -> int:
    """Exit status: 0; 1 for a run that failed or is missing; 2 for a wrong flag."""
    if argv not in ([], ["--report"]):
        print("error: python study.py [--report]", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    try:
        read_doc()  # before hours of training
        if not argv:
            prepare_data()
            is_computed = all((KEPT / name).exists() for name in ("oracle.json", "rules.json"))
            train_all(() if is_computed else ORACLE_SEEDS)
        write_report()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
