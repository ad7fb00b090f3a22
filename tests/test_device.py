"""data/device.py: mixup, CutMix and random erasing are timm's on the same random numbers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import mixup as timm_mixup
from timm.data import random_erasing as timm_erasing

from data.device import erase, get_boxes, mix
from data.order import ERASING, MIXUP, get_generator

SEED, CLASSES = 7, 6
BOTH = (0.8, 1.0)  # alphas of mixup and CutMix


def make_batch(height=24, width=17):
    """An image of each class, and the labels."""
    images = torch.randn(CLASSES, 3, height, width, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(CLASSES)


def get_dense(targets):
    """Our pairs as targets (B, C), which timm has."""
    return sum(share * F.one_hot(labels, CLASSES) for labels, share in targets)


def apply_timm(monkeypatch, alphas, number, **options):
    """(images, dense targets, whether it was CutMix) of timm's Mixup, on the numbers that `mix` draws."""
    generator, asked = get_generator(MIXUP, SEED, number), []

    def rand():
        asked.append("rand")
        return 0.0 if asked == ["rand"] else generator.random()  # the first: whether to mix at all

    def randint(low, high, size):
        asked.append("randint")
        assert (low, size) == (0, None)
        return generator.integers(high)

    random = SimpleNamespace(rand=rand, beta=generator.beta, randint=randint)
    with monkeypatch.context() as patch:
        patch.setattr(timm_mixup, "np", SimpleNamespace(random=random, sqrt=np.sqrt, clip=np.clip))
        theirs = timm_mixup.Mixup(*alphas, label_smoothing=0.0, num_classes=CLASSES, **options)
        return *theirs(*make_batch()), "randint" in asked


@pytest.mark.parametrize(
    "alphas, kinds", [((0.2, 0.0), {False}), ((0.0, 1.0), {True}), (BOTH, {False, True})]
)
def test_mixup_and_cutmix_are_timms(monkeypatch, alphas, kinds):
    """Images and targets; CutMix to the bit. In mode "batch", λ corrected for what the border cuts off."""
    seen, is_cut_off = set(), False
    for number in range(40):
        mixed, targets = mix(*make_batch(), *alphas, SEED, number)
        expected, dense, cuts = apply_timm(monkeypatch, alphas, number)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=0 if cuts else 1e-6)
        torch.testing.assert_close(get_dense(targets), dense, rtol=0, atol=1e-6)
        assert sum(share for _, share in targets) == pytest.approx(1)
        seen.add(cuts)
        _, uncorrected, _ = apply_timm(monkeypatch, alphas, number, correct_lam=False)
        is_cut_off |= not torch.allclose(dense, uncorrected, atol=0.01)  # control
    assert seen == kinds and is_cut_off == (True in kinds)


def test_mix_is_a_function_of_seed_and_number():
    images, labels = make_batch()
    same, targets = mix(images, labels, 0.0, 0.0, SEED, 3)
    assert same is images and targets == [(labels, 1.0)]
    mixed, targets = mix(*make_batch(), *BOTH, SEED, 3)
    again, same_targets = mix(*make_batch(), *BOTH, SEED, 3)
    assert torch.equal(mixed, again) and torch.equal(get_dense(targets), get_dense(same_targets))
    for seed, number in ((SEED, 4), (SEED + 1, 3)):  # control
        assert not torch.equal(mixed, mix(*make_batch(), *BOTH, seed, number)[0])


def test_half_of_the_batches_have_cutmix_and_lambda_is_betas():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    cut, lams = 0, []
    for number in range(2000):
        mixed, _ = mix(images.clone(), labels, *BOTH, SEED, number)
        cut += int(torch.isin(mixed, images).all())  # no pixel has a new value
        lams.append(mix(images, labels, 0.2, 0.0, SEED, number)[1][0][1])
    assert abs(cut / 2000 - 0.5) < 0.05
    # Beta(a, a): 1 / (4 (2a + 1))
    assert len(set(lams)) > 1900 and abs(np.mean(lams) - 0.5) < 0.05
    assert abs(np.var(lams) - 1 / (4 * 1.4)) < 0.02


# ---- random erasing


class Replay:
    """Python's `random`, with the numbers that get_boxes draws: image after image, in timm's order."""

    def __init__(self, count, generator):
        self.image, self.most_attempts = -1, 0
        self.chance = generator.random(count)
        self.area = generator.uniform(0.02, 1 / 3, (count, 10))
        self.aspect = generator.uniform(math.log(0.3), math.log(1 / 0.3), (count, 10))
        self.places = [generator.random(count), generator.random(count)]

    def random(self):
        self.image, self.attempt, self.kind = self.image + 1, 0, 0
        return self.chance[self.image]

    def uniform(self, low, high):
        if (low, high) == (0.02, 1 / 3):
            return self.area[self.image, self.attempt]
        assert (low, high) == pytest.approx((math.log(0.3), math.log(1 / 0.3)))
        self.attempt += 1
        self.most_attempts = max(self.most_attempts, self.attempt)
        return self.aspect[self.image, self.attempt - 1]

    def randint(self, low, high):
        assert low == 0
        self.kind += 1
        return int(self.places[self.kind - 1][self.image] * (high + 1))


@pytest.mark.parametrize("height, width", [(32, 32), (40, 23), (4, 60)])
def test_random_erasings_boxes_are_timms(monkeypatch, height, width):
    """Pixel by pixel; in the flattest images some of the ten attempts fail, and all of them in a few."""
    count, most_attempts = 200, 0
    for number in range(3):
        replay = Replay(count, get_generator(ERASING, SEED, number))
        with monkeypatch.context() as patch:
            patch.setattr(timm_erasing, "random", replay)
            theirs = timm_erasing.RandomErasing(0.6, mode="const", device="cpu")  # const: 0 in the box
            expected = theirs(torch.ones(count, 3, height, width)) == 0
        most_attempts = max(most_attempts, replay.most_attempts)
        images = torch.full((count, 3, height, width), 99.0)
        got = erase(images, 0.6, SEED, number) != 99
        assert torch.equal(got, expected) and 0.4 < got.any(dim=(1, 2, 3)).float().mean() < 0.75
        other = erase(images, 0.6, SEED, number + 100) != 99
        assert not torch.equal(other, expected)  # control
    assert (most_attempts == 10) == (height == 4)


def test_boxes_that_fit_nowhere_are_left_out():
    boxes = get_boxes(500, 1, 40, 0.9, get_generator(ERASING, SEED, 0))
    assert (boxes[:, 0] == boxes[:, 1]).all()  # none is less than one pixel high
    boxes = get_boxes(5000, 30, 20, 0.25, get_generator(ERASING, SEED, 0))
    top, bottom, left, right = boxes[boxes[:, 1] > boxes[:, 0]].T
    assert abs(len(top) / 5000 - 0.25) < 0.03
    assert (top >= 0).all() and (bottom <= 30).all() and (left >= 0).all() and (right <= 20).all()
    assert ((bottom - top) * (right - left)).max() < 600 / 3 * 1.1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_erased_is_noise_of_its_own(device):
    images = torch.full((64, 32, 32, 3), 99.0, device=device).permute(0, 3, 1, 2)  # channels_last
    assert erase(images, 0.0, SEED, 1) is images
    state = torch.get_rng_state()
    erased = erase(images, 0.5, SEED, 1)
    assert torch.equal(state, torch.get_rng_state())  # dropout draws from there
    assert erased.is_contiguous(memory_format=torch.channels_last) and (images == 99).all()
    noise = erased[erased != 99]
    assert len(noise) > 10_000 and noise.unique().numel() > 0.99 * len(noise)  # each pixel and channel
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(erased, erase(images, 0.5, SEED, 1))
    for seed, number in ((SEED, 2), (SEED + 1, 1)):  # control
        assert not torch.equal(erased, erase(images, 0.5, seed, number))
