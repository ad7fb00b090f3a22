"""AdamW as the recipe has it, its state by parameter name, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def get_lr(step: int, peak: float, warmup_steps: int, total_steps: int, frozen_at: int | None = None, rewarm_steps: int = 0) -> float:
    """Learning rate of optimiser step `step` (from 0): linear to `peak` over `warmup_steps`, then a cosine to 0 at the end.

    With `rewarm_steps` it rises once more, linearly from 0 to the cosine, over so many steps from step `frozen_at` on.
    """
    if frozen_at is not None and 0 <= step - frozen_at < rewarm_steps:
        return get_lr(step, peak, warmup_steps, total_steps) * (step - frozen_at + 1) / rewarm_steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW β = (0.9, 0.999) over what is trainable; the loop sets each step's lr.

    Weight decay on Linear and Conv weights and adapter matrices only: no biases, norms, positions, class token. It is torch's
    (multiplied by lr): big_vision's 1e-4 at lr 1e-3 is 0.1 here.
    """
    decayed, rest = [], []
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix, recurse=False):
            if p.requires_grad:
                matrix = p.ndim >= 2 and (isinstance(module, (nn.Linear, nn.Conv2d)) or ".lora_" in name)
                (decayed if matrix else rest).append(p)
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    if len({isinstance(p, DTensor) for p in decayed + rest}) > 1:  # a temporary of an unsharded module, see model.parallel.reshard
        raise AssertionError("some of the trainable parameters are sharded and some are not")
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.999), fused=True)


def get_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """{parameter name: {exp_avg, exp_avg_sq, step}}, the optimiser's own tensors, for the parameters that have stepped."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def set_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]) -> None:
    """Hand states to the parameters of the same name. Those without one start fresh; states of what is no longer trained are
    dropped: after the freeze nothing refers to the base's moments."""
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if name in state and p in trained:
            optimizer.state[p] = state[name]
