"""What is done to a batch on the device: normalise, then mixup or CutMix, then random erasing.

The random numbers are drawn on the host, except for the noise that erases: the device draws that, from a seed
of the host's, and a CPU's noise is another than a GPU's. Each is a pure function of the seed and the
micro-batch's number in the run, and nothing waits for the device. The order is timm's, whose loader mixes as
it collates and erases on the device (unless it is told --no-prefetcher): what is erased is the mixed image.
"""

import functools
import math

import numpy as np
import torch

from data.order import ERASING, MIXUP, get_generator

Targets = list[tuple[torch.Tensor, float]]  # (labels (B,), share), of shares that add up to 1
# timm's random erasing, as its --reprob alone sets it.
MIN_AREA, MAX_AREA = 0.02, 1 / 3  # of the image's
MIN_ASPECT, MAX_ASPECT = 0.3, 1 / 0.3
ATTEMPTS = 10  # to draw a box that is smaller than the image


@functools.lru_cache
def _get_constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """255·mean and 1/(255·std), cached because a tensor made from Python numbers waits for the device."""

    def constant(values: list[float]) -> torch.Tensor | float:
        if len(set(values)) == 1:  # one for all channels: a number needs no tensor
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


# ---- mixup and CutMix


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    mixup_alpha: float,
    cutmix_alpha: float,
    seed: int,
    number: int,
) -> tuple[torch.Tensor, Targets]:
    """mixup or CutMix of a micro-batch, in which each image has a partner: the first one the last, and so on.

    images: float (B, C, H, W), which CutMix changes in place; labels: (B,). λ ~ Beta(alpha, alpha) is one for
    the batch, a Python float. Where both alphas are above 0, the batch has CutMix with probability 1/2 and
    mixup otherwise; where both are 0, nothing is changed. As timm's Mixup in mode "batch". The loss is
    sum(share * cross_entropy(logits, labels) for labels, share in targets).
    """
    if mixup_alpha == cutmix_alpha == 0:
        return images, [(labels, 1.0)]
    generator = get_generator(MIXUP, seed, number)
    cuts = cutmix_alpha > 0
    if cuts and mixup_alpha > 0:
        cuts = generator.random() < 0.5
    if not cuts:
        return mixup(images, labels, float(generator.beta(mixup_alpha, mixup_alpha)))
    lam = float(generator.beta(cutmix_alpha, cutmix_alpha))
    height, width = images.shape[-2:]
    return cutmix(images, labels, lam, int(generator.integers(height)), int(generator.integers(width)))


def mixup(images: torch.Tensor, labels: torch.Tensor, lam: float) -> tuple[torch.Tensor, Targets]:
    """λ·images + (1-λ)·partners, and the targets (Zhang et al. 2018, arXiv:1710.09412)."""
    return torch.lerp(images.flip(0), images, lam), [(labels, lam), (labels.flip(0), 1 - lam)]


def cutmix(
    images: torch.Tensor, labels: torch.Tensor, lam: float, y: int, x: int
) -> tuple[torch.Tensor, Targets]:
    """A box around pixel (y, x) from the partner, in place (Yun et al. 2019, arXiv:1905.04899).

    The box has the images' aspect and 1-λ of their area, before it is cut off at the border. The targets'
    shares are those of the pixels after that.
    """
    height, width = images.shape[-2:]
    ratio = math.sqrt(1 - lam)
    box_height, box_width = int(height * ratio), int(width * ratio)
    top, bottom = max(y - box_height // 2, 0), min(y + (box_height + 1) // 2, height)
    left, right = max(x - box_width // 2, 0), min(x + (box_width + 1) // 2, width)
    images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return images, [(labels, share), (labels.flip(0), 1 - share)]


# ---- random erasing


def erase(images: torch.Tensor, probability: float, seed: int, number: int) -> torch.Tensor:
    """Random erasing (Zhong et al. 2017, arXiv:1708.04896): in so many of the images a box becomes noise.

    images: float (B, C, H, W), normalised. The noise is N(0, 1) in each pixel and channel: timm's --remode
    pixel. The result is other memory, or `images` itself with probability 0.
    """
    if probability == 0:
        return images
    count, channels, height, width = images.shape
    device, generator = images.device, get_generator(ERASING, seed, number)
    boxes = torch.from_numpy(get_boxes(count, height, width, probability, generator))
    if device.type == "cuda":  # from pinned memory the copy is not waited for
        boxes = boxes.pin_memory().to(device, non_blocking=True)
    top, bottom, left, right = boxes.view(count, 4, 1, 1).unbind(1)  # (B, 1, 1) each
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    inside = (top <= y) & (y < bottom) & (left <= x) & (x < right)  # (B, H, W)
    rng = torch.Generator(device).manual_seed(int(generator.integers(2**63)))
    noise = torch.randn(count, height, width, channels, generator=rng, device=device, dtype=images.dtype)
    return torch.where(inside[:, None], noise.permute(0, 3, 1, 2), images)


def get_boxes(
    count: int, height: int, width: int, probability: float, generator: np.random.Generator
) -> np.ndarray:
    """top, bottom, left, right of `count` images' boxes, int64 (count, 4); bottom is top where there is none.

    As timm's RandomErasing: MIN_AREA to MAX_AREA of the image, MIN_ASPECT to MAX_ASPECT times as high as
    wide, uniform in the logarithm; the first of ATTEMPTS that is smaller than the image in both directions.
    """
    is_erased = generator.random(count) < probability
    area = height * width * generator.uniform(MIN_AREA, MAX_AREA, (count, ATTEMPTS))
    aspect = np.exp(generator.uniform(math.log(MIN_ASPECT), math.log(MAX_ASPECT), (count, ATTEMPTS)))
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < height) & (widths < width)
    first = np.arange(count), fits.argmax(axis=1)
    is_erased &= fits[first]
    box_height, box_width = np.where(is_erased, heights[first], 0), np.where(is_erased, widths[first], 0)
    # One of height - box_height + 1 places, and the like across.
    top = np.floor(generator.random(count) * (height - box_height + 1))
    left = np.floor(generator.random(count) * (width - box_width + 1))
    return np.stack([top, top + box_height, left, left + box_width], axis=1).astype(np.int64)
