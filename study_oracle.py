"""What the baselines' own checkpoints say, without training: means of weights; the oracle, what each Linear
learns after the switch cut to a rank; and how much of that the ranks of each rank rule leave.

study.py calls it, and keeps what it finds in docs/study/runs.
"""

import dataclasses
import math
import os

import torch
from torch import Tensor

import evaluate
import train
from errors import UserError
from lora.inject import match_families
from lora.ranks import Ranks, Spectrum, count_parameters, spectrum_ranks
from model import checkpoint
from model.optim import get_lr
from model.variants import LORA_FAMILIES
from monitor.log import load_run
from start import check_spectrum, count_base, decide_ranks, get_schedule
from study_runs import BASELINE, Arm, build_command, evaluate_held_out, get_kept, get_run_dir

ORACLE_SEEDS, ORACLE_RANKS = (0, 1, 2), (4, 16, 64)
RULES = {
    "minmax": "minmax (Algorithm 2)",
    "uniform": "uniform",
    "budget": "budget, by the norms' change",
    "spectrum": "spectrum, of the last window",
    "oracle": "the spectrum of the rest itself",
}


def compute_oracle() -> dict:
    """Top-1 on the held-out images of each seed: `means`, the mean of the weights at two epochs' ends, and at
    the second; `oracle`, by rank, the weights after 14 epochs and of what training did to each Linear from
    there on the part of that rank, by SVD, everything else as it was at the end."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    out: dict[str, dict[str, list[float]]] = {"means": {}, "oracle": {}}

    def add(kind: str, name: str, cfg, weights: dict[str, Tensor]) -> None:
        out[kind].setdefault(name, []).append(evaluate_weights(cfg, weights))

    for seed in ORACLE_SEEDS:
        cfg, after = load_weights(seed, (13, 14, 23, 24))
        for first, second in ((13, 14), (23, 24)):
            mean = {name: (after[first][name] + after[second][name]) / 2 for name in after[first]}
            add("means", f"mean of {first} and {second}", cfg, mean)
            add("means", f"after {second}", cfg, after[second])
        changes = decompose(after[14], after[24])
        for rank in ORACLE_RANKS:
            add("oracle", str(rank), cfg, take_low_rank(after[14], after[24], changes, rank))
    return out


def load_weights(seed: int, epochs: tuple[int, ...]) -> tuple[train.Config, dict[int, dict]]:
    """(settings, {epoch: {name: weight}}) of a baseline's checkpoints. Raises UserError for one that it
    doesn't keep."""
    run_dir, steps = get_run_dir(BASELINE, seed), {}
    for path, meta in checkpoint.kept(run_dir):
        steps[meta["state"]["epoch"]] = path, meta
    after = {}
    for epoch in epochs:
        if epoch not in steps:
            raise UserError(f"{run_dir} keeps no checkpoint of epoch {epoch}")
        path, meta = steps[epoch]
        cfg, s = evaluate.load_checkpoint(path, meta)
        after[epoch] = dict(evaluate.build_checkpoint(cfg, s, path).state_dict())
    return cfg, after


def decompose(before: dict, end: dict) -> dict[tuple[str, int], tuple]:
    """{(Linear, row part): U, S, V of what was done to it from `before` to the `end`}, of the blocks'."""
    changes = {}
    for name, weight in end.items():
        if name.startswith("blocks.") and weight.ndim == 2:
            parts = (weight - before[name]).chunk(3 if ".qkv." in name else 1)
            for part, change in enumerate(parts):
                found = torch.linalg.svd(change, full_matrices=False)
                changes[name.removesuffix(".weight"), part] = tuple(found)
    return changes


def take_low_rank(
    before: dict, end: dict, changes: dict[tuple[str, int], tuple], rank: int | dict[tuple[str, int], int]
) -> dict[str, Tensor]:
    """The weights at the `end`, but of each part of the blocks' Linears `before` plus what was done to it, of
    `changes` (`decompose`'s), cut to `rank`: of all, or of each {(Linear, row part): rank}."""
    parts: dict[str, list[Tensor]] = {}
    for (name, part), (U, S, V) in changes.items():
        r = rank if isinstance(rank, int) else rank[name, part]
        parts.setdefault(name, []).append((U[:, :r] * S[:r]) @ V[:r])
    out = dict(end)
    for name, cut in parts.items():
        out[f"{name}.weight"] = before[f"{name}.weight"] + torch.cat(cut)
    return out


def evaluate_weights(cfg: train.Config, weights: dict[str, Tensor]) -> float:
    """Top-1 in % on the held-out images."""
    model = train.build_model(cfg, "full", None, torch.device("cpu"))
    model.load_state_dict(weights)
    return evaluate_held_out(cfg, model)["val_top1"]


# ------------------------------------------------------------------------------------------------------------
# the rank rules against the oracle


def compute_rules(arm: Arm, seeds: tuple[int, ...]) -> dict[str, dict[str, list[float]]]:
    """{rule: {"parameters", "share", "top1": [of each seed]}} for the rules of RULES at minmax's parameters,
    and for "oracle": the rule spectrum on what the rest of training did.

    `share`: of the summed σ² of what the rest did to the Linears, decay taken out, the share that the largest
    σ of each are, as many as its rank. `top1`: see `take_low_rank`. The switch and the rest are those of
    `arm`, and the ranks are given by the baselines' kept logs. Raises UserError where these have no spectrum,
    or a baseline's checkpoints are not there."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    out: dict[str, dict[str, list[float]]] = {}
    for rule in RULES:
        out[rule] = {"parameters": [], "share": [], "top1": []}
    for seed in seeds:
        cfg, _ = build_command(arm, seed)
        net = train.build_net(cfg)
        _, costs = count_base(cfg, net)
        epochs = load_run(get_kept(BASELINE, seed)).epochs[: cfg.switch_epoch]
        check_spectrum(dataclasses.replace(cfg, rank_rule="spectrum"), net, epochs)
        own, after = load_weights(seed, (cfg.switch_epoch, cfg.epochs))
        before, end = after[cfg.switch_epoch], after[cfg.epochs]
        first, last = epochs[-1]["step"], epochs[-1]["step"] // cfg.switch_epoch * cfg.epochs
        spectrum = get_rest(cfg, net, before, end, get_decay(own, first, last))
        changes = decompose(before, end)
        for rule in RULES:
            if rule == "oracle":
                budget = int(out["minmax"]["parameters"][-1])
                ranks = spectrum_ranks(spectrum, costs, budget, cfg.rank_min, cfg.rank_max)
            else:
                ranks = decide_ranks(dataclasses.replace(cfg, rank_rule=rule), net, epochs)
            cut = take_low_rank(before, end, changes, get_ranks_by_linear(cfg, net, ranks))
            out[rule]["parameters"].append(count_parameters(ranks, costs))
            out[rule]["share"].append(get_share(spectrum, ranks))
            out[rule]["top1"].append(evaluate_weights(own, cut))
    return out


def get_decay(cfg: train.Config, first: int, last: int) -> float:
    """What decay alone leaves of a weight from step `first` to step `last`, the last one of a run of `cfg`
    with all parameters."""
    schedule = get_schedule(cfg, last)
    return math.prod(1 - get_lr(step, **schedule) * cfg.weight_decay for step in range(first, last))


def get_rest(cfg: train.Config, net, before: dict, end: dict, decay: float) -> Spectrum:
    """All singular values of end - decay * before, of each layer of each family."""
    spectrum: Spectrum = {}
    for family, layers in match_families(net, LORA_FAMILIES, cfg.target_modules).items():
        spectrum[family] = []
        for name, part, parts in layers:
            D = end[f"{name}.weight"] - decay * before[f"{name}.weight"]
            spectrum[family].append(torch.linalg.svdvals(D.chunk(parts)[part].double()).tolist())
    return spectrum


def get_share(spectrum: Spectrum, ranks: Ranks) -> float:
    """Of all summed σ² the share of the largest ones of each layer, as many as its rank."""
    captured, whole = 0.0, 0.0
    for family, layers in spectrum.items():
        for values, rank in zip(layers, ranks[family]):
            captured += math.fsum(value**2 for value in values[:rank])
            whole += math.fsum(value**2 for value in values)
    return captured / whole


def get_ranks_by_linear(cfg: train.Config, net, ranks: Ranks) -> dict[tuple[str, int], int]:
    """{(Linear, row part): rank}."""
    families = match_families(net, LORA_FAMILIES, cfg.target_modules)
    by_linear = {}
    for family, layers in families.items():
        for (name, part, _), rank in zip(layers, ranks[family]):
            by_linear[name, part] = rank
    return by_linear
