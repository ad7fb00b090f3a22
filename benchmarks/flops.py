"""FLOPs of an image in a training step: by LoRA's formulas, and as they are done where W + B A is made."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train
from data.datasets import DATASETS
from lora import kernels
from lora.layers import LoRALinear
from lora.ranks import Ranks
from model.variants import VARIANTS
from monitor.perf import count_flops


def addmm_shapes(out, a, b, **kwargs) -> int:
    """FLOPs of addmm_, from the tensors' shapes: torch's counter knows addmm only."""
    return 2 * a[0] * a[1] * b[1]


def count_spared(model: nn.Module, rows: int) -> int:
    """FLOPs that `model`'s LoRALinears, on `rows` rows each, spare of those torch counts for them: see
    lora.kernels.merges.

    Both sides are counted: torch's by the formulas of the operators, what is done by going through them
    product by product.
    """
    total, is_first = 0, True
    for module in model.modules():
        if isinstance(module, LoRALinear):
            total += count_spared_of(module, rows, is_first)
            is_first = False
    return total


def count_spared_of(module: LoRALinear, rows: int, is_first: bool) -> int:
    """`count_spared` of one LoRALinear. Below the first of a frozen model nothing trains: no dx there."""

    def to_meta(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=module.lora_A.dtype, device="meta")

    A, Bs, weight = (
        to_meta(module.lora_A),
        [to_meta(B) for B in module.lora_B.values()],
        to_meta(module.weight),
    )
    x = torch.empty(rows, module.in_features, dtype=A.dtype, device="meta")
    dy = torch.empty(rows, module.out_features, dtype=A.dtype, device="meta")
    where, parts = [int(part) for part in module.lora_B], len(module.ranks)
    trained = module.weight.requires_grad
    need_x, need_bias = trained or not is_first, trained and module.bias is not None
    operators = (kernels.prepare, kernels.lora_linear, kernels.lora_linear_backward)
    counts = []
    for prepare, forward, backward in (operators, [operator._init_fn for operator in operators]):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_shapes}) as counter:
            prepared = prepare(x, weight, A, Bs, where, parts, False)
            forward(x, weight, None, A, Bs, prepared, where, parts, False)
            needs = (need_x, trained, need_bias, True)
            backward(dy, x, weight, A, prepared, Bs, where, parts, *needs, False)
        counts.append(counter.get_total_flops())
    return counts[0] - counts[1]


def count_phase(
    cfg: train.Config, phase: str, ranks: Ranks, batch_size: int, device: torch.device
) -> tuple[int, int]:
    """FLOPs of an image in a step of the phase: by LoRA's formulas, and as they are done on `device` at this
    batch size."""
    model = train.build_on_meta(cfg, phase, ranks)
    size = DATASETS[cfg.dataset].image_size
    flops = count_flops(model, torch.empty(1, 3, size, size, device="meta"))
    if cfg.dtype != "float32" or device.type != "cpu":
        return flops, flops
    tokens = (size // VARIANTS[cfg.model]["patch_size"]) ** 2 + 1
    return flops, flops - count_spared(model, batch_size * tokens) // batch_size
