"""AdamW as the recipe has it, its state by parameter name, and the learning rate as a pure function of the
step."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def get_lr(
    step: int,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: str = "cosine",
    decay_share: float = 0.2,
    frozen_at: int | None = None,
    rewarm_steps: int = 0,
    lora_factor: float | None = None,
) -> float:
    """Learning rate of optimiser step `step` (from 0): linear to `peak` over `warmup_steps`, then by
    `schedule`.

    "cosine": half a cosine to 0 at `total_steps`. "wsd" (warmup, stable, decay; 2404.06395): `peak`, and
    over the last `decay_share` of `total_steps` linearly to 0.

    After step `frozen_at`, the freeze, there are two changes. With `lora_factor` k it falls linearly from k
    times the schedule's rate there to 0 at `total_steps`, whatever the schedule says. With `rewarm_steps` it
    rises over so many steps, linearly from 0 to what it would be.
    """
    if frozen_at is not None and 0 <= step - frozen_at < rewarm_steps:
        arguments = peak, warmup_steps, total_steps, schedule, decay_share, frozen_at, 0, lora_factor
        return get_lr(step, *arguments) * (step - frozen_at + 1) / rewarm_steps
    if frozen_at is not None and lora_factor is not None:
        at_freeze = get_lr(frozen_at, peak, warmup_steps, total_steps, schedule, decay_share)
        left = (total_steps - step) / max(total_steps - frozen_at, 1)
        return lora_factor * at_freeze * max(left, 0.0)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "wsd":
        decay_steps = max(round(decay_share * total_steps), 1)
        return peak * min(max((total_steps - step) / decay_steps, 0.0), 1.0)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_optimizer(model: nn.Module, weight_decay: float) -> Optimizer:
    """Fused AdamW, β = (0.9, 0.999), over what is trainable; `apply_update` sets each step's learning rate.

    The weight decay is torch's, multiplied by lr: big_vision's 1e-4 at lr 1e-3 is 0.1 here. Another optimiser
    goes here and nowhere else: its state is moved, saved and loaded under whatever names it has.
    """
    decayed, rest = split_parameters(model)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trainable, in the model's order: (what weight decay is for, the rest).

    Weight decay is for Linear and Conv weights and for adapters' matrices: not for biases, norms, positions
    and class token.
    """
    adapters = get_adapters(model)
    decayed, rest = [], []
    for module in model.modules():
        is_matrix_product = isinstance(module, (nn.Linear, nn.Conv2d))
        for p in module.parameters(recurse=False):
            if not p.requires_grad:
                continue
            if p.ndim >= 2 and (is_matrix_product or p in adapters):
                decayed.append(p)
            else:
                rest.append(p)
    if len({isinstance(p, DTensor) for p in decayed + rest}) > 1:
        # A temporary of an unsharded module is among them: see model.parallel.reshard.
        raise AssertionError("some of the trainable parameters are sharded and some are not")
    return decayed, rest


def get_adapters(model: nn.Module) -> set[nn.Parameter]:
    """The adapters' parameters. What is one a module says itself, by `adapter_parameters()`: {name:
    parameter}."""
    adapters = set()
    for module in model.modules():
        if hasattr(module, "adapter_parameters"):
            adapters.update(module.adapter_parameters().values())
    return adapters


def apply_update(optimizer: Optimizer, lr: float, skip: Tensor) -> None:
    """One optimiser step at learning rate `lr`, or none where `skip` (a bool, 0-d) is true; then gradients
    are gone.

    A skipped step leaves weights, moments and step counts as they were, whatever the gradients hold. An
    optimiser that follows GradScaler's protocol (`_step_supports_amp_scaling`, as torch's fused AdamW has it)
    skips on the device, where nothing waits. Before any other the host looks at `skip`: a sync each step.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skip.float()
        optimizer.step()
        del optimizer.found_inf
    elif not skip:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def get_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """{parameter name: its state}, the optimiser's own tensors, for the parameters that have stepped.

    The keys are the optimiser's: {exp_avg, exp_avg_sq, step} with AdamW, {momentum_buffer} with SGD.
    """
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def set_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """Hand states to the parameters of the same name.

    Those without one start fresh. States of what is no longer trained are dropped: after the freeze nothing
    refers to the base's moments.
    """
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if name in state and p in trained:
            optimizer.state[p] = state[name]
