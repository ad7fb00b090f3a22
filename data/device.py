"""What is done to a batch on the device: normalise and mixup."""

import functools

import torch

from data.order import MIXUP, get_generator


@functools.lru_cache
def _get_constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """255·mean and 1/(255·std), cached because a tensor made from Python numbers waits for the device."""

    def constant(values: list[float]) -> torch.Tensor | float:
        if len(set(values)) == 1:
            return values[0]
        return torch.tensor(values, dtype=torch.float64).float().view(1, 3, 1, 1).to(device)

    return constant([255 * m for m in mean]), constant([1 / (255 * s) for s in std])


def normalise(
    images: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(images / 255 - mean) / std, computed in float32: uint8 (B, 3, H, W) -> `dtype`, same memory format.

    mean, std: three numbers each, in units of the full range. Computed as (x - 255·mean) · 1/(255·std). After
    the first call on a device the host doesn't wait for it.
    """
    offset, scale = _get_constants(tuple(mean), tuple(std), images.device)
    # In place: on a CPU fresh memory costs more than arithmetic.
    return images.float().sub_(offset).mul_(scale).to(dtype)


def mixup(
    images: torch.Tensor, labels: torch.Tensor, alpha: float, seed: int, step: int
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, float]]]:
    """mixup (Zhang et al. 2018, arXiv:1710.09412): each image with its mirror in the batch.

    images: float (B, …); labels: (B,). λ ~ Beta(alpha, alpha) is one for the batch, a Python float and a pure
    function of (seed, step), so that nothing waits for the device. Returns λ·images + (1-λ)·flipped and the
    targets, pairs (labels (B,), share) whose shares add up to 1. The loss is
    sum(share * cross_entropy(logits, labels) for labels, share in targets).
    alpha = 0 changes nothing: images, [(labels, 1.0)].
    """
    if alpha == 0:
        return images, [(labels, 1.0)]
    lam = float(get_generator(MIXUP, seed, step).beta(alpha, alpha))
    targets = [(labels, lam), (labels.flip(0), 1 - lam)]
    return torch.lerp(images.flip(0), images, lam), targets
