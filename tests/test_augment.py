"""Crop, resize and RandAugment against Pillow, torchvision and timm; what is drawn, and how often."""

import io

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_aa
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision.transforms import CenterCrop, ColorJitter, Compose, RandomResizedCrop, Resize
from torchvision.transforms import functional as TF

from data import decode, folder, randaugment
from data.augment import JITTERED, color_jitter, get_choice, get_jitters, get_random_crop, rand_augment
from data.decode import decode_jpeg, load_turbojpeg, resize
from data.import_ffcv import import_ffcv
from data.loader import build_loader
from data.randaugment import OPERATIONS, SIGNED, get_arguments
from errors import UserError

RNG = np.random.default_rng(0)
IMAGES = {
    "noise": RNG.integers(0, 256, (96, 80, 3), dtype=np.uint8),
    "smooth": np.array(
        Image.fromarray(RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(
            (80, 96), Image.Resampling.BICUBIC
        )
    ),
    "dark": RNG.integers(20, 90, (96, 80, 3), dtype=np.uint8),
    "one colour": np.full((32, 32, 3), 77, np.uint8),
    "two colours": np.where(RNG.random((64, 64, 3)) < 0.3, 10, 200).astype(np.uint8),
    "28 × 33": RNG.integers(0, 256, (28, 33, 3), dtype=np.uint8),
    "2 × 2": RNG.integers(0, 256, (2, 2, 3), dtype=np.uint8),
    "1 × 1": RNG.integers(0, 256, (1, 1, 3), dtype=np.uint8),
}


def apply_timm(name, image, argument):
    arguments = () if timm_aa.LEVEL_TO_ARG[name] is None else (argument,)
    options = {"fillcolor": (128,) * 3, "resample": Image.Resampling.BILINEAR}
    return np.array(timm_aa.NAME_TO_OP[name](Image.fromarray(image), *arguments, **options))


def differences(name, argument):
    for image in IMAGES.values():
        ours = np.empty_like(image)
        randaugment.apply_operation(OPERATIONS.index(name), image, ours, float(argument))
        yield np.abs(ours.astype(int) - apply_timm(name, image, argument))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_timms(name):
    """To the bit, on Pillow images.

    Rotate within one level on less than 1 pixel of 1,000, where a sine is rounded differently.
    """
    level = timm_aa.LEVEL_TO_ARG[name]
    for magnitude in (1, 4, 9, 10, 15, 18) if level else (10,):
        ours = get_arguments(magnitude)[OPERATIONS.index(name)]
        if level:  # timm draws a sign, if any, here
            assert {abs(level(magnitude, {})[0]) for _ in range(30)} == {ours}
        if name == "Posterize" and ours < 1:
            continue  # Pillow has stopped to keep no bits; ours gives black, as TF does
        for sign in (1, -1) if name in SIGNED else (1,):
            argument = int(ours) if name in ("Posterize", "Solarize", "SolarizeAdd") else sign * ours
            apart = np.concatenate([d.ravel() for d in differences(name, argument)])
            assert apart.max() <= (name == "Rotate") and (apart > 0).mean() < 1e-3


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"AutoContrast", "Equalize", "Invert"}))
def test_control_another_argument_is_another_image(name):
    argument = {"Posterize": 4, "Solarize": 128, "SolarizeAdd": 60}.get(name, 0.5)
    image, ours = IMAGES["noise"], np.empty_like(IMAGES["noise"])
    randaugment.apply_operation(OPERATIONS.index(name), image, ours, argument * 1.25)
    assert np.abs(ours.astype(int) - apply_timm(name, image, argument)).mean() > 1 or name == "Rotate"
    if name == "Rotate":
        assert not np.array_equal(ours, apply_timm(name, image, argument))


def test_the_scale_goes_beyond_ten():
    """timm stops at 10 unless told otherwise, and leaves out half of all operations; AugReg does neither."""
    stops, goes_on = [
        timm_aa.rand_augment_transform(f"rand-m15-n2{option}", {}).ops[3] for option in ("", "-mmax15-p1.0")
    ]
    assert (stops.magnitude_max or 10, stops.prob) == (10, 0.5) and (goes_on.magnitude_max, goes_on.prob) == (
        15,
        1.0,
    )
    assert [op.name for op in timm_aa.rand_augment_transform("rand-m15-n2", {}).ops] == list(OPERATIONS)
    assert (
        get_arguments(15)[OPERATIONS.index("Rotate")]
        == 45
        == 1.5 * get_arguments(10)[OPERATIONS.index("Rotate")]
    )
    assert get_arguments(15)[OPERATIONS.index("Solarize")] == 256  # which changes nothing, in TF as well


def test_operations_are_drawn_evenly():
    n = 15_000
    choices = np.array(
        [
            [get_choice(3, epoch, index, layer) for layer in range(2)]
            for epoch in (1, 2)
            for index in range(n // 2)
        ]
    )
    operations, signs = choices[..., 0], choices[..., 1]  # (n, 2)
    for layer in range(2):
        counts = np.bincount(operations[:, layer], minlength=15)
        assert (
            len(counts) == 15 and ((counts - n / 15) ** 2 / (n / 15)).sum() < 42.6
        )  # chi-square of 14 degrees: 1 in 10,000
    pairs = np.bincount(
        operations[:, 0] * 15 + operations[:, 1], minlength=225
    )  # with replacement, the layers independent
    assert ((pairs - n / 225) ** 2 / (n / 225)).sum() < 310  # of 224 degrees
    signed = np.isin(operations, [OPERATIONS.index(name) for name in SIGNED])
    assert (signs[~signed] == 1).all() and abs(
        (signs[signed] == -1).mean() - 0.5
    ) < 5 * 0.5 / signed.sum() ** 0.5


def test_rand_augment_is_timms_operations_one_after_the_other():
    images = np.stack([IMAGES["smooth"]] * 64)
    ours, one = np.empty_like(images), np.empty_like(images[:1])
    rand_augment(images, ours, np.arange(100, 164), 5, 2, 2, 15)
    apart = [
        np.abs(
            np.asarray(folder.timm_rand_augment(Image.fromarray(images[i]), 5, 2, 100 + i, 2, 15)).astype(int)
            - ours[i]
        )
        for i in range(64)
    ]
    assert np.mean([d.max() == 0 for d in apart]) > 0.9 and np.mean(apart) < 1e-3
    rand_augment(images[7:8], one, np.array([107]), 5, 2, 2, 15)
    assert np.array_equal(one[0], ours[7])  # its index decides, not its place in a batch
    rand_augment(images, other := np.empty_like(images), np.arange(100, 164), 5, 3, 2, 15)
    assert np.mean([np.array_equal(a, b) for a, b in zip(ours, other)]) < 0.3  # control: another epoch


# ---- colour jitter


def apply_torchvision(monkeypatch, image, index, amount):
    """torchvision's ColorJitter, as timm uses it, with the numbers that get_jitters draws."""
    operations, factors = get_jitters(np.array([index]), 5, 2, amount)
    order = [list(JITTERED).index(operation) for operation in operations[0]]
    of_each = [float(factors[0, order.index(k)]) for k in range(3)]  # brightness, contrast, saturation
    params = ([3, *order], *of_each, None)  # 3 is hue, which is off
    with monkeypatch.context() as patch:
        patch.setattr(ColorJitter, "get_params", lambda *args: params)
        return np.array(ColorJitter(amount, amount, amount)(Image.fromarray(image)))


@pytest.mark.parametrize("amount", [0.4, 1.0, 2.5])
def test_colour_jitter_is_torchvisions(monkeypatch, amount):
    """To the bit, in numba and on Pillow images."""
    for name, image in IMAGES.items():
        images, indices = np.stack([image] * 24), np.arange(100, 124)
        color_jitter(images, ours := np.empty_like(images), indices, 5, 2, amount)
        for i, index in enumerate(indices):
            expected = apply_torchvision(monkeypatch, image, index, amount)
            assert np.array_equal(ours[i], expected), (name, index)
            theirs = folder.torchvision_color_jitter(Image.fromarray(image), 5, 2, index, amount)
            assert np.array_equal(theirs, expected)
    images = np.stack([IMAGES["smooth"]] * 24)
    color_jitter(images, ours := np.empty_like(images), indices, 5, 2, amount)
    color_jitter(images, other := np.empty_like(images), indices, 5, 3, amount)
    assert not any(np.array_equal(a, b) for a, b in zip(ours, other))  # control: another epoch
    color_jitter(images[7:8], one := np.empty_like(images[:1]), indices[7:8], 5, 2, amount)
    assert np.array_equal(one[0], ours[7])  # its index decides, not its place in a batch


@pytest.mark.parametrize("amount", [0.4, 1.5])
def test_jitters_are_drawn_evenly(amount):
    n = 6000
    operations, factors = get_jitters(np.arange(n), 3, 1, amount)
    orders, counts = np.unique(operations, axis=0, return_counts=True)
    assert len(orders) == 6 and ((counts - n / 6) ** 2 / (n / 6)).sum() < 25.7  # 5 degrees: 1 in 10,000
    low, high = ColorJitter(amount).brightness
    assert (low, high) == (max(0, 1 - amount), 1 + amount)
    for k in JITTERED:
        own = factors[operations == k]
        assert len(own) == n and low <= own.min() and own.max() <= high
        assert distance(own, np.linspace(low, high, n)) < 2.2 * (1 / n) ** 0.5
    of_each = np.array([factors[operations == k] for k in JITTERED])  # (3, n)
    assert np.abs(np.corrcoef(of_each) - np.eye(3)).max() < 0.06


def test_colour_jitter_comes_after_rand_augment_as_in_timm():
    """timm leaves it out beside RandAugment unless it is forced, since there it is on by default."""
    options = dict(color_jitter=0.4, use_prefetcher=True)
    names = [
        [
            type(step).__name__
            for step in transforms_imagenet_train(auto_augment=policy, **options, **force).transforms
        ]
        for policy, force in (("rand-m9", {"force_color_jitter": True}), ("rand-m9", {}), (None, {}))
    ]
    assert [step for step in names[0] if step in ("RandAugment", "ColorJitter")] == [
        "RandAugment",
        "ColorJitter",
    ]
    assert "ColorJitter" not in names[1] and "ColorJitter" in names[2]
    loader = build_loader(
        "synthetic", "imagenet", "", "train", 4, 0, rand_augment_magnitude=9, color_jitter=0.4
    )
    steps = [name for name, *_ in loader.options.augmentations]
    assert steps == ["flip", "rand_augment", "color_jitter"]


# ---- crop and resize


def crops(height, width, min_area, n=3000):
    return np.array([get_random_crop(height, width, min_area, 1, 0, i) for i in range(n)])


def torchvision_crops(height, width, min_area, n=3000):
    image = Image.new("L", (width, height))
    return np.array([RandomResizedCrop.get_params(image, [min_area, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])


def distance(a, b):
    """Kolmogorov-Smirnov's, of two samples."""
    grid = np.concatenate([a, b])
    return np.abs(
        (np.sort(a).searchsorted(grid, "right") - np.sort(b).searchsorted(grid, "right")) / len(a)
    ).max()


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (400, 120)])
def test_random_crops_are_torchvisions(height, width):
    def features(crop):
        top, left, h, w = crop.T
        return [h * w, w / h, top / np.maximum(height - h, 1), left / np.maximum(width - w, 1)]

    ours, theirs, others = [
        features(f(height, width, a)) for f, a in ((crops, 0.05), (torchvision_crops, 0.05), (crops, 0.25))
    ]
    bound = 2.2 * (2 / 3000) ** 0.5  # passed by chance once in 10,000
    assert max(distance(a, b) for a, b in zip(ours, theirs)) < bound < distance(ours[0], others[0])
    top, left, h, w = crops(height, width, 0.05).T
    assert (
        (top >= 0).all()
        and (left >= 0).all()
        and (top + h <= height).all()
        and (left + w <= width).all()
        and (h * w > 0).all()
    )


@pytest.mark.parametrize("height, width", [(1, 1), (50, 8000), (8000, 50), (1, 300), (300, 1)])
def test_crops_of_extreme_images_stay_inside(height, width):
    ours, theirs = crops(height, width, 0.05, 300), torchvision_crops(height, width, 0.05, 300)
    assert (
        (ours[:, 0] + ours[:, 2] <= height).all()
        and (ours[:, 1] + ours[:, 3] <= width).all()
        and (ours >= [0, 0, 1, 1]).all()
    )
    most = lambda found: max(
        map(tuple, found), key=list(map(tuple, found)).count
    )  # the fall-back, where ten attempts fail
    assert most(ours) == most(theirs)


@pytest.mark.parametrize(
    "shape", [(375, 500), (500, 375), (224, 224), (256, 256), (257, 300), (1, 1), (3, 700), (90, 31)]
)
def test_resize_is_pillows(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    out, square = np.empty((224, 224, 3), np.uint8), np.empty((64, 64, 3), np.uint8)
    decode.crop_and_resize(image, out, np.zeros(4, np.int64), 256)
    assert np.array_equal(out, Compose([Resize(256), CenterCrop(224)])(Image.fromarray(image)))
    crop = get_random_crop(*shape, 0.05, 4, 2, 9)
    decode.crop_and_resize(image, square, np.array(crop), 0)
    assert np.array_equal(square, TF.resized_crop(Image.fromarray(image), *crop, [64, 64]))
    resize(image, square, 64, 64, 0, 0)
    nearest = np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.NEAREST))
    assert np.array_equal(square, Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
    assert shape == (1, 1) or not np.array_equal(square, nearest)  # control


# ---- JPEG


@pytest.fixture(scope="module")
def turbojpeg():
    try:
        import_ffcv()
    except UserError as error:
        pytest.skip(str(error))
    import ffcv._libffcv

    load_turbojpeg(ffcv._libffcv.__file__)


def jpeg(image, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **options)
    return np.frombuffer(file.getvalue(), np.uint8)


@pytest.mark.parametrize(
    "options", [{"quality": 90}, {"quality": 30}, {"quality": 95, "subsampling": 0}, {"progressive": True}]
)
def test_jpeg_is_decoded_as_pillow_does(turbojpeg, options):
    image = np.array(Image.fromarray(IMAGES["smooth"]).resize((333, 222)))
    data, out = jpeg(image, **options), np.empty_like(image)
    assert decode_jpeg(data, out)
    assert np.array_equal(out, Image.open(io.BytesIO(data.tobytes())))


def test_damaged_jpegs_are_noticed(turbojpeg):
    def sound(data, shape=(64, 48, 3)):
        data = data.copy()
        data.setflags(write=False)
        return decode_jpeg(data, np.empty(shape, np.uint8))

    data = jpeg(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    assert sound(data)
    for cut in (0, 2, 100, len(data) // 2, len(data) - 2):
        assert not sound(data[:cut]), cut
    assert not sound(np.random.default_rng(1).integers(0, 256, len(data), dtype=np.uint8)) and not sound(
        np.zeros_like(data)
    )
    damaged = data.copy()
    damaged[len(data) // 2 :][:40] = 255  # markers where there must be none
    assert not sound(damaged)
    assert not sound(data, (64, 47, 3)) and not sound(data, (128, 96, 3))
