"""python -m data.beton: trees of every kind of image, bad ones, ILSVRC's tars; and both loaders on them."""

import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from test_data import epochs_of_ranks, equal, needs_ffcv, within
from torchvision.datasets import imagenet

import train
from config.cli import typed_config
from data import folder
from data.beton import check_beton, main, read_about, read_samples
from data.datasets import DATASETS
from data.images import ImageTree, open_dataset, unpack_imagenet
from data.import_ffcv import import_ffcv
from data.loader import build_loader
from data.order import DataError
from data.rgb import read_image
from data.staging import get_staged_dir, stage
from errors import UserError
from launch import distributed
from model import checkpoint, parallel

pytestmark = needs_ffcv
LONG = "ü" * 120 + ".jpg"  # 244 bytes of the 255 that a name may have


def photo(height, width, seed):
    """Smooth enough for JPEG, and nowhere the same."""
    small = np.random.default_rng(seed).integers(
        0, 256, (-(-height // 30) + 1, -(-width // 30) + 1, 3), dtype=np.uint8
    )
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """train and val of three classes, 24 and 13 images: every mode and format, shapes that nobody expects."""
    root, seed = tmp_path_factory.mktemp("tree"), 0
    for split, plain in (("train", 4), ("val", 2)):
        for label in ("ant", "bee", "čmelák"):
            for i in range(plain):
                seed += 1
                save(
                    photo(150 + 40 * (seed % 5), 160 + 30 * (seed % 7), seed),
                    root / split / label / f"{i}.JPEG",
                    quality=95,
                )
        ant, bee = root / split / "ant", root / split / "bee"
        save(photo(180, 200, 90).convert("L"), ant / "grey.jpg")
        save(photo(180, 200, 91).convert("CMYK"), ant / "cmyk.jpg")
        save(photo(300, 100, 95), bee / "turned.jpg", exif=turned())
        save(photo(180, 200, 96).convert("RGBA"), bee / LONG.replace("jpg", "png"))
        save(Image.new("RGB", (1, 1), (9, 99, 199)), bee / "1x1.png")
        save(photo(50, 8000 if split == "val" else 1600, 97), bee / "wide.jpg")
        save(photo(600, 900, 98), bee / "large.webp", lossless=True)
    alpha = photo(180, 200, 92).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize((200, 180)))
    save(alpha, root / "train/ant/alpha.png")
    save(photo(180, 200, 93).convert("P"), root / "train/ant/palette.png", transparency=3)
    save(
        Image.fromarray((np.arange(180 * 200).reshape(180, 200) * 65535 // 36000).astype(np.uint16)),
        root / "train/ant/16 bit.png",
    )
    save(photo(180, 200, 94), root / "train/bee/x.webp")
    save(photo(180, 200, 94).convert("1"), root / "train/bee/x.gif")
    (root / "train/bee/notes.txt").write_text("not an image, and not called one")
    return root


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    return exif


@pytest.fixture(scope="session")
def betons(tree, tmp_path_factory):
    """{(mode): folder with train.beton and val.beton}, written from `tree`."""
    out = {}
    for mode in ("raw", "jpg"):
        out[mode] = tmp_path_factory.mktemp(mode)
        for split in ("train", "val"):
            assert (
                main(
                    [
                        str(tree / split),
                        str(out[mode] / f"{split}.beton"),
                        "--mode",
                        mode,
                        "--max_resolution",
                        "1600",
                        "--workers",
                        "2",
                    ]
                )
                == 0
            )
    return out


def build(backend, root, split="train", batch_size=4, **kwargs):
    options = dict(num_workers=1, num_classes=3, rand_augment_magnitude=15) | kwargs
    return build_loader(backend, "imagenet", root, split, batch_size, 5, **options)


# ---- what is read, and written


def test_every_format_is_upright_rgb(tree):
    image = read_image(tree / "train/bee/turned.jpg")
    assert image.size == (300, 100) and image.mode == "RGB"  # it lies 100 × 300 in the file
    upright = np.array(Image.open(tree / "train/bee/turned.jpg").rotate(-90, expand=True))
    assert np.array_equal(image, upright)
    deep = np.array(read_image(tree / "train/ant/16 bit.png"))
    assert len(np.unique(deep)) == 256 and abs(deep.mean() - 127) < 1  # not cut off at 255
    assert np.array_equal(
        read_image(tree / "train/ant/cmyk.jpg"), Image.open(tree / "train/ant/cmyk.jpg").convert("RGB")
    )
    assert {read_image(path).mode for path in tree.rglob("*.*") if path.suffix != ".txt"} == {"RGB"}


def test_tree_to_beton(tree, betons, capsys):
    source = ImageTree(tree / "train")
    assert [Path(path).name for path in source.ignored] == ["notes.txt"]
    for mode in ("raw", "jpg"):
        samples = read_samples(betons[mode] / "train.beton")
        assert check_beton(betons[mode] / "train.beton") == len(samples) == len(source) == 24
        assert samples[:, 5].tolist() == source.targets and (samples[:, 2] == (mode == "raw")).all()
        index = json.loads((betons[mode] / "train.json").read_text())
        assert (
            index["classes"] == ["ant", "bee", "čmelák"] == read_about(betons[mode] / "train.beton").classes
            and index["num_samples"] == 24
        )
        assert samples[:, 3:5].tolist() == [[source[i][0].height, source[i][0].width] for i in range(24)]
        assert [10, 1600] in read_samples(betons[mode] / "val.beton")[
            :, 3:5
        ].tolist()  # 8000 × 50, made smaller
    start, size = samples[0, :2]
    stored = Image.open(
        io.BytesIO(np.fromfile(betons["jpg"] / "train.beton", np.uint8, size, offset=start).tobytes())
    )
    assert (
        stored.format == "JPEG" and np.abs(np.array(stored).astype(int) - np.array(source[0][0])).mean() < 3
    )


def test_large_images_are_made_smaller(tree, tmp_path):
    assert (
        main([str(tree / "val"), str(tmp_path / "val.beton"), "--max_resolution", "160", "--quality", "50"])
        == 0
    )
    shapes = read_samples(tmp_path / "val.beton")[:, 3:5]
    assert shapes.max() == 160 and shapes.min() == 1 and [1, 160] in shapes.tolist()  # 8000 × 50
    assert (tmp_path / "val.json").exists() and len(list(tmp_path.iterdir())) == 2


def test_an_image_larger_than_ffcvs_page(tmp_path):
    save(photo(2000, 1800, 0), tmp_path / "tree/a/large.png")  # 10.8 MB, and FFCV's page has 8
    assert (
        main(
            [str(tmp_path / "tree"), str(tmp_path / "out.beton"), "--mode", "raw", "--max_resolution", "2000"]
        )
        == 0
    )
    assert check_beton(tmp_path / "out.beton") == 1


@pytest.fixture
def bad_tree(tree, tmp_path):
    shutil.copytree(tree / "val", tmp_path / "tree")
    (tmp_path / "tree/bee/x.jpg").write_text("a text file")
    whole = (tmp_path / "tree/ant/0.JPEG").read_bytes()
    (tmp_path / "tree/ant/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "tree/ant/empty.png").touch()
    return tmp_path / "tree"


def test_a_bad_image_stops_and_is_named(bad_tree, tmp_path, capsys):
    assert within(20, main, [str(bad_tree), str(tmp_path / "out.beton"), "--workers", "1"]) == 1
    err = capsys.readouterr().err.strip().split("\n")[-1]
    assert (
        err.startswith("error: ")
        and f"{bad_tree}/ant/cut.jpg cannot be read as an image" in err
        and "--skip_bad" in err
    )
    assert list(tmp_path.glob("out*")) == []


def test_bad_images_are_skipped_and_listed(bad_tree, tmp_path, capsys):
    out = tmp_path / "out.beton"
    assert (
        main(
            [
                str(bad_tree),
                str(out),
                "--workers",
                "2",
                "--skip_bad",
                "--mode",
                "raw",
                "--max_resolution",
                "1600",
            ]
        )
        == 0
    )
    assert "3 of 16 images were left out" in capsys.readouterr().err
    report = (tmp_path / "out.skipped.txt").read_text().splitlines()
    assert [line.split(" cannot")[0] for line in report] == [
        f"{bad_tree}/{name}" for name in ("ant/cut.jpg", "ant/empty.png", "bee/x.jpg")
    ]
    good, samples = ImageTree(bad_tree), read_samples(out)
    good.samples = [
        (path, label)
        for path, label in good.samples
        if Path(path).name not in ("cut.jpg", "empty.png", "x.jpg")
    ]
    assert len(samples) == 13 == json.loads((tmp_path / "out.json").read_text())["num_samples"]
    for (start, size, _, height, width, label), (image, expected) in zip(
        samples.tolist(), good, strict=True
    ):  # each its own pixels
        image.thumbnail((1600, 1600), Image.Resampling.LANCZOS)
        assert (
            np.fromfile(out, np.uint8, size, offset=start).tobytes() == image.tobytes() and label == expected
        )
        assert (width, height) == image.size
    import_ffcv().reader.Reader(str(out))
    for path, _ in good.samples:
        os.unlink(path)
    assert main([str(bad_tree), str(tmp_path / "none.beton"), "--skip_bad"]) == 1
    assert "none of 3 images can be read" in capsys.readouterr().err and not list(tmp_path.glob("none*"))


def test_a_class_without_images(tree, tmp_path, capsys):
    shutil.copytree(tree / "val", tmp_path / "tree")
    (tmp_path / "tree/bat").mkdir()
    (tmp_path / "tree/bat/Thumbs.db").touch()
    assert main([str(tmp_path / "tree"), str(tmp_path / "out.beton")]) == 1
    assert "class folders without images: bat: remove them or fill them" in capsys.readouterr().err
    assert main([str(tmp_path / "tree"), str(tmp_path / "out.beton"), "--skip_bad"]) == 0
    assert f"{tmp_path}/out.beton: no image is of these classes: bat\n" in capsys.readouterr().err
    assert read_about(tmp_path / "out.beton").classes == ["ant", "bat", "bee", "čmelák"]
    assert set(read_samples(tmp_path / "out.beton")[:, 5]) == {0, 2, 3}


def test_a_full_disk_while_writing(tree, tmp_path, monkeypatch, capsys):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # where quotas and network file systems say so
    assert main([str(tree / "val"), str(tmp_path / "val.beton")]) == 1
    assert capsys.readouterr().err.strip().split("\n")[
        -1
    ] == "error: [Errno 28] No space left on device" and not list(tmp_path.iterdir())


def test_a_damaged_exif_beside_a_sound_image(tmp_path):
    save(photo(40, 30, 0), tmp_path / "x.jpg", exif=b"Exif\x00\x00not a TIFF header")
    assert read_image(tmp_path / "x.jpg").size == (30, 40)


def test_one_image(tmp_path):
    save(photo(60, 50, 0), tmp_path / "tree/only/one.png")
    assert main([str(tmp_path / "tree"), str(tmp_path / "val.beton"), "--workers", "8"]) == 0
    (batch,) = build("ffcv", tmp_path, "val", num_classes=1).epoch(0)
    assert batch[1].tolist() == [0, -1, -1, -1] and batch[0][0].float().std() > 1 and not batch[0][1:].any()


@pytest.mark.parametrize(
    "argv, reason",
    [
        (["nowhere", "out.beton"], "no folder nowhere"),
        ([".", "out.beton"], "holds 1 images, the first ./loose.jpg, and no class folders"),
        (["imagenet:test", "out.beton"], "unknown split"),
        (
            ["imagenet:train", "out.beton", "--root", "nowhere"],
            "is there nor nowhere/ILSVRC2012_img_train.tar",
        ),
        (["TREE", "out.beton", "--quality", "0"], "quality must be"),
        (["TREE", "out.beton", "--max_resolution", "0"], "max_resolution must be"),
        (["TREE", "out.beton", "--max_resolution", "5000"], "max_resolution must be"),
        (["TREE", "out.beton", "--workers", "0"], "0 workers"),
        (["TREE", "/dev/null/out.beton"], "/dev/null"),
        (["TREE", "out.json"], "ends in .beton"),
        (["TREE", "out.beton", "--root", "elsewhere"], "--root belongs to a named data set"),
    ],
)
def test_mistakes_are_one_line(tree, tmp_path, monkeypatch, capsys, argv, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loose.jpg").touch()
    assert main([argument.replace("TREE", str(tree / "val")) for argument in argv]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and reason in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["loose.jpg"]


# ---- ILSVRC2012's own files


def pack(path, files):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def as_jpeg(seed):
    file = io.BytesIO()
    photo(90, 80, seed).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def ilsvrc(tmp_path, monkeypatch):
    """Two classes and four validation images, packed as ILSVRC2012 is; torchvision knows their sums."""
    scipy_io = pytest.importorskip("scipy.io")
    wnids = ["n01440764", "n01443537"]
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "i4")]
    synsets = np.array(
        [
            (2, wnids[0], "tench, Tinca tinca", "", 0),
            (1, wnids[1], "goldfish", "", 0),
            (3, "n0", "fish", "", 2),
        ],
        kinds,
    )
    scipy_io.savemat(tmp_path / "meta.mat", {"synsets": synsets})
    for i, wnid in enumerate(wnids):
        pack(tmp_path / f"{wnid}.tar", {f"{wnid}_{n}.JPEG": as_jpeg(10 * i + n) for n in range(3)})
    files = {
        "train": pack(
            tmp_path / "ILSVRC2012_img_train.tar",
            {f"{wnid}.tar": (tmp_path / f"{wnid}.tar").read_bytes() for wnid in wnids},
        ),
        "val": pack(
            tmp_path / "ILSVRC2012_img_val.tar",
            {f"ILSVRC2012_val_{n:08d}.JPEG": as_jpeg(50 + n) for n in range(4)},
        ),
        "devkit": pack(
            tmp_path / "ILSVRC2012_devkit_t12.tar.gz",
            {
                "ILSVRC2012_devkit_t12/data/meta.mat": (tmp_path / "meta.mat").read_bytes(),
                "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n2\n1\n",
            },
        ),
    }
    sums = {kind: (path.name, hashlib.md5(path.read_bytes()).hexdigest()) for kind, path in files.items()}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", sums)
    return tmp_path


def test_ilsvrcs_own_tars(ilsvrc, tmp_path, capsys):
    for split, labels in (("train", [0, 0, 0, 1, 1, 1]), ("val", [0, 0, 1, 1])):
        assert main([f"imagenet:{split}", str(tmp_path / f"out/{split}.beton"), "--root", str(ilsvrc)]) == 0
        assert read_samples(tmp_path / f"out/{split}.beton")[:, 5].tolist() == labels
        assert read_about(tmp_path / f"out/{split}.beton").classes == ["n01440764", "n01443537"]
    # the ground truth's 1 is goldfish, the second in the alphabet: images 0 and 3
    assert sorted(path.name[-9:-5] for path in (ilsvrc / "val/n01443537").iterdir()) == ["0000", "0003"]


def test_a_damaged_or_missing_archive(ilsvrc, capsys):
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").rename(ilsvrc / "elsewhere")
    with pytest.raises(UserError, match="devkit"):
        unpack_imagenet(ilsvrc, "val")
    (ilsvrc / "elsewhere").rename(ilsvrc / "ILSVRC2012_devkit_t12.tar.gz")
    os.truncate(ilsvrc / "ILSVRC2012_img_train.tar", 5000)
    assert main(["imagenet:train", str(ilsvrc / "out.beton"), "--root", str(ilsvrc)]) == 1
    assert "corrupted" in capsys.readouterr().err and not (ilsvrc / "train").exists()


def test_unpacking_that_was_killed_is_begun_again(ilsvrc):
    (ilsvrc / "train.tmp/n01440764").mkdir(parents=True)
    (ilsvrc / "train.tmp/n01440764/half.JPEG").touch()
    unpack_imagenet(ilsvrc, "train")
    assert len(list((ilsvrc / "train").rglob("*.*"))) == 6 and not (ilsvrc / "train.tmp").exists()
    unpack_imagenet(ilsvrc, "train")  # nothing to do


# ---- the two loaders on it


@pytest.mark.parametrize("split, epoch", [("train", 0), ("train", 1), ("val", 0)])
def test_backends_agree_to_the_bit_on_the_same_pixels(tree, betons, split, epoch):
    """Decode, crop, resize, flip and RandAugment in numba are Pillow's, torchvision's and timm's."""
    ours, reference = [
        list(build(backend, root, split).epoch(epoch))
        for backend, root in (("ffcv", betons["raw"]), ("folder", tree))
    ]
    apart = [(a.int() - b.int()).abs() for (a, _), (b, _) in zip(ours, reference, strict=True)]
    if split == "val":  # but for the one that was made smaller
        wide = ImageTree(tree / "val").samples.index((str(tree / "val/bee/wide.jpg"), 1))
        assert apart[wide // 4][wide % 4].max() > 0
        apart[wide // 4][wide % 4] = 0
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, reference))
    exact = max(d.max() for d in apart) == 0
    assert (
        exact or split == "train" and sum(float(d.float().mean()) for d in apart) < 1e-2
    )  # Rotate, and what follows it
    images = torch.cat([images for images, _ in ours])
    assert (
        images.shape[1:] == (3, 224, 224)
        and images.dtype == torch.uint8
        and images.is_contiguous(memory_format=torch.channels_last)
    )
    assert (
        not equal(ours, build("ffcv", betons["raw"], split, rand_augment_magnitude=0).epoch(epoch))
        or split == "val"
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_backends_agree_on_another_size_and_colour_jitter(tree, betons, split):
    options = dict(image_size=96, color_jitter=0.4, rand_augment_magnitude=0)
    ours = list(build("ffcv", betons["raw"], split, **options).epoch(1))
    reference = list(build("folder", tree, split, **options).epoch(1))
    if split == "val":  # but for the image that was made smaller
        wide = ImageTree(tree / "val").samples.index((str(tree / "val/bee/wide.jpg"), 1))
        for batches in (ours, reference):
            batches[wide // 4][0][wide % 4] = 0
    assert equal(ours, reference) and ours[0][0].shape == (4, 3, 96, 96)
    plain = build("ffcv", betons["raw"], split, **options | {"color_jitter": 0.0}).epoch(1)
    assert split == "val" or not equal(ours, plain)  # control


def test_evaluation_of_jpegs_is_close_to_that_of_the_originals(tree, betons):
    """Quality 90 at full size: 1 level apart on average, and Pillow's to the bit on what is stored."""
    ours, originals = [
        torch.cat([images for images, _ in build(backend, root, "val").epoch(0)])[:13].int()
        for backend, root in (("ffcv", betons["jpg"]), ("folder", tree))
    ]
    assert 0.1 < (ours - originals).abs().float().mean((1, 2, 3)).median() < 1.5
    file = np.fromfile(betons["jpg"] / "val.beton", np.uint8)
    for image, (start, size, *_) in zip(ours, read_samples(betons["jpg"] / "val.beton")):
        stored = Image.open(io.BytesIO(file[start : start + size].tobytes()))
        expected = folder.center_crop(folder.resize(stored, 256), [224, 224])
        assert np.array_equal(image.permute(1, 2, 0), expected)


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_workers_ranks_and_resume(betons, mode):
    whole = list(build("ffcv", betons[mode], num_workers=2).epoch(3))
    assert len(whole) == 6 and equal(whole, build("ffcv", betons[mode]).epoch(3))
    assert equal(whole[2:], build("ffcv", betons[mode], num_workers=2).epoch(3, start_batch=2))
    for ranks in (2, 4):
        loader = build("ffcv", betons[mode], batch_size=4 // ranks, world_size=ranks)
        parts = zip(*epochs_of_ranks(loader, 3))
        assert equal(whole, [[torch.cat(tensors) for tensors in zip(*batches)] for batches in parts])
    assert not equal(whole, build("ffcv", betons[mode]).epoch(4))


@pytest.mark.parametrize("backend", ["ffcv", "folder"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_image_is_evaluated_once(tree, betons, backend, ranks):
    root = betons["raw"] if backend == "ffcv" else tree
    loader = build(backend, root, "val", world_size=ranks)
    labels = torch.cat([labels for batches in epochs_of_ranks(loader, 0) for _, labels in batches])
    assert sorted(labels[labels >= 0].tolist()) == sorted(ImageTree(tree / "val").targets)


# ---- damage


def copy(folder, path):
    for file in folder.iterdir():
        shutil.copy(file, path)
    return path


def test_a_damaged_jpeg_is_no_black_image(betons, tmp_path):
    """Corrupt bytes in the data, which no check of the structure sees."""
    path = copy(betons["jpg"], tmp_path) / "train.beton"
    start, size = read_samples(path)[17, :2].tolist()
    with open(path, "r+b") as file:
        file.seek(start + size // 2)
        file.write(b"\xff" * 60)
    assert check_beton(path) == 24
    loader = within(30, build, "ffcv", tmp_path)
    with pytest.raises(DataError, match=f"{path}: .*image 17 is a damaged JPEG"):
        within(10, list, loader.epoch(0))
    assert len(list(build("ffcv", tmp_path, "val").epoch(0))) == 4  # control: the other file is whole


def test_a_bad_file_in_a_tree_is_named(tree, tmp_path):
    shutil.copytree(tree / "val", tmp_path / "train")
    (tmp_path / "train/bee/1x1.png").write_bytes(b"\x89PNG")
    for num_workers in (0, 1):
        reason = "train/bee/1x1.png cannot be read as an image: [^\n]*; replace or remove the file[^\n]*$"
        with pytest.raises(DataError, match=reason):
            within(20, list, build("folder", tmp_path, batch_size=2, num_workers=num_workers).epoch(0))


@pytest.mark.parametrize("backend", ["ffcv", "folder"])
def test_another_number_of_classes(tree, betons, backend):
    with pytest.raises(UserError, match="has 3 classes, expected 1000: say --num_classes 3 .*: ant, bee"):
        build(backend, betons["raw"] if backend == "ffcv" else tree, num_classes=None)


def test_a_damaged_index(betons, tmp_path):
    copy(betons["raw"], tmp_path)
    (tmp_path / "val.json").write_text('{"num_sam')
    with pytest.raises(UserError, match="val.json is damaged"):
        build("ffcv", tmp_path, "val")
    (tmp_path / "val.json").unlink()  # FFCV's own writer makes none
    assert len(build("ffcv", tmp_path, "val")) == 4


# ---- train.py on it


@pytest.fixture
def at_28_pixels(monkeypatch):
    """ImageNet's pipeline with images that a tiny model takes."""
    monkeypatch.setitem(DATASETS, "imagenet", DATASETS["imagenet"]._replace(image_size=28, short_side=32))


def train_on(root, run_dir, *flags):
    argv = [
        "--dataset",
        "imagenet",
        "--data_dir",
        root,
        "--run_dir",
        run_dir,
        "--num_classes",
        3,
        "--compile",
        False,
        "--dtype",
        "float32",
        "--batch_size",
        8,
        "--epochs",
        3,
        "--lr_warmup_steps",
        2,
        "--rank_max",
        32,
        "--num_workers",
        1,
        "--rand_augment",
        10,
        "--mixup",
        0.2,
    ]
    return train.main([str(argument) for argument in [*argv, *flags]])


def read_events(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def epochs(run_dir):
    return [event for event in read_events(run_dir) if event["event"] == "epoch"]


def test_train_on_a_tree_by_both_loaders_and_resume(tree, betons, tmp_path, at_28_pixels, capsys):
    runs = {"whole": ("ffcv", betons["raw"]), "cut": ("ffcv", betons["raw"]), "folder": ("folder", tree)}
    for name, (backend, root) in runs.items():
        assert (
            train_on(root, tmp_path / name, "--loader", backend, *["--max_steps", 4] * (name == "cut")) == 0
        ), capsys.readouterr().err
    assert train.main(["--run_dir", str(tmp_path / "cut"), "--resume", "True", "--max_steps", "None"]) == 0
    (start,) = [event for event in read_events(tmp_path / "folder") if event["event"] == "start"]
    assert [note.split(": ")[-1] for note in start["notes"]] == [
        f"1 files or folders, the first {tree}/train/bee/notes.txt"
    ]
    whole, cut, reference = [epochs(tmp_path / name) for name in runs]
    assert [e["train_loss"] for e in whole] == [
        e["train_loss"] for e in cut
    ]  # in the middle of epoch 2, with everything random on
    assert [e["train_loss"] for e in whole] == pytest.approx([e["train_loss"] for e in reference], rel=1e-4)
    assert [e["val_top1"] for e in whole] == [e["val_top1"] for e in cut]
    assert (
        train.main(
            ["--run_dir", str(tmp_path / "cut"), "--resume", "True", "--num_classes", "4", "--epochs", "4"]
        )
        == 2
    )
    assert "classes" in capsys.readouterr().err.strip().split("\n")[-1]


@pytest.mark.parametrize("backend", ["ffcv", "folder"])
def test_train_and_val_of_different_classes(tree, tmp_path, at_28_pixels, capsys, backend):
    """As many, so that only their names tell. An accuracy over mixed-up labels looks like a bad model."""
    shutil.copytree(tree, tmp_path / "data")
    (tmp_path / "data/val/bee").rename(tmp_path / "data/val/wasp")
    for split in ("train", "val"):
        assert main([str(tmp_path / "data" / split), str(tmp_path / f"data/{split}.beton")]) == 0
    assert train_on(tmp_path / "data", tmp_path / "run", "--loader", backend) == 2
    assert "do not have the same classes: only train has bee; only val has wasp" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["ffcv", "folder"])
def test_bad_data_in_training_is_one_line(tree, betons, tmp_path, at_28_pixels, capsys, backend):
    root = tmp_path / "data"
    if backend == "ffcv":
        root.mkdir()
        start, size = read_samples(copy(betons["jpg"], root) / "train.beton")[3, :2].tolist()
        with open(root / "train.beton", "r+b") as file:
            file.seek(start + size // 2)
            file.write(b"\xff" * 60)
    else:
        shutil.copytree(tree, root)
        (root / "train/ant/0.JPEG").write_text("no image")
    assert train_on(root, tmp_path / "run", "--loader", backend) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert (
        len(err) == 1
        and ("image 3 is a damaged JPEG" if backend == "ffcv" else "0.JPEG cannot be read as an image")
        in err[0]
    )


def test_stage(betons, tmp_path, at_28_pixels, capsys):
    data_dir, disk = tmp_path / "data", tmp_path / "disk"
    data_dir.mkdir()
    copy(betons["jpg"], data_dir)
    staged = get_staged_dir(data_dir, disk)
    assert train_on(data_dir, tmp_path / "run", "--stage_dir", disk, "--max_steps", 1) == 0
    assert sorted(path.name for path in staged.iterdir()) == [
        "train.beton",
        "train.json",
        "val.beton",
        "val.json",
    ]
    assert (staged / "train.beton").read_bytes() == (data_dir / "train.beton").read_bytes()
    assert "staging" in capsys.readouterr().err
    first = (staged / "train.beton").stat()
    stage("imagenet", data_dir, disk)
    assert (staged / "train.beton").stat() == first  # not again
    os.utime(data_dir / "train.beton", (1, 1))  # written anew
    (staged / f"train.beton.{socket.gethostname()}.17.tmp").touch()  # of a process that is no more
    others = staged / "train.beton.elsewhere.17.tmp"
    others.touch()  # perhaps of one that is at work: the "local" disk may be shared
    stage("imagenet", data_dir, disk)
    assert (staged / "train.beton").stat().st_ino != first.st_ino
    assert others.exists() and len(list(staged.iterdir())) == 5
    os.truncate(staged / "val.beton", 1000)
    stage("imagenet", data_dir, disk)
    assert check_beton(staged / "val.beton") == 13
    assert train_on(data_dir, tmp_path / "other", "--stage_dir", disk, "--loader", "folder") == 2
    assert "stage_dir is for .beton files" in capsys.readouterr().err


def test_staging_that_cannot_be(betons, tmp_path, at_28_pixels, monkeypatch, capsys):
    copy(betons["jpg"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        assert train_on(tmp_path, tmp_path / "run", "--stage_dir", tmp_path / "disk") == 2
    assert "0.0 GB free, the data needs" in capsys.readouterr().err
    os.truncate(tmp_path / "val.beton", 1000)
    assert train_on(tmp_path, tmp_path / "run", "--stage_dir", tmp_path / "disk") == 2
    assert "cut short" in capsys.readouterr().err and not list((tmp_path / "disk").rglob("*.beton"))
    (tmp_path / "train.beton").unlink()
    assert train_on(tmp_path, tmp_path / "run", "--stage_dir", tmp_path / "disk") == 2
    assert "python -m data.beton imagenet:train" in capsys.readouterr().err


def count_calls(calls, fails):
    def work():
        (calls / str(distributed.get_world_rank())).touch()
        time.sleep(2.5)  # longer than a collective may take
        if distributed.get_world_rank() == fails:
            raise UserError("the disk is full")

    distributed.start()
    parallel.set_timeout(timedelta(seconds=1.5), dist.group.WORLD)
    os.environ["LOCAL_RANK"] = str(distributed.get_world_rank() % 2)
    try:
        distributed.once_per_node(work)
    except ValueError as error:
        return str(error)
    finally:
        distributed.finish()


@pytest.mark.parametrize("fails, reason", [(-1, None), (2, "rank 2: the disk is full")])
def test_once_per_node(on_ranks, tmp_path, fails, reason):
    seen = on_ranks(4, count_calls, tmp_path, fails)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2"]
    assert all(reason is None and s is None or s and s.startswith(reason) for s in seen)


@pytest.mark.slow
def test_top1_is_the_same_through_both_loaders(tmp_path, monkeypatch):
    """Fashion-MNIST as photographs of 60 to 110 pixels, trained on .beton JPEGs.

    The originals give the same top-1 within 0.2 points.
    """
    monkeypatch.setitem(
        DATASETS, "imagenet", DATASETS["imagenet"]._replace(image_size=28, short_side=32, min_area=0.5)
    )
    rng = np.random.default_rng(0)
    for split, n in (("train", 3000), ("val", 10000)):  # of 2,000, four that flip are 0.2 points
        source = open_dataset("fashion_mnist", "datasets/fashion_mnist", split)
        for i in range(n):
            image, label = source[i]
            size = (int(rng.integers(60, 110)), int(rng.integers(60, 110)))
            save(
                image.convert("RGB").resize(size, Image.Resampling.BICUBIC),
                tmp_path / "tree" / split / str(label) / f"{i}.png",
            )
        assert main([str(tmp_path / "tree" / split), str(tmp_path / f"{split}.beton")]) == 0
    flags = [
        "--num_classes",
        10,
        "--epochs",
        12,
        "--batch_size",
        100,
        "--lr",
        2e-3,
        "--rand_augment",
        0,
        "--mixup",
        0,
    ]
    assert train_on(tmp_path, tmp_path / "run", *flags) == 0
    last = epochs(tmp_path / "run")[-1]
    assert last["val_top1"] > 60
    cfg = typed_config(train.Config, json.loads((tmp_path / "run/config.json").read_text()), "stored")
    model = train.build_model(cfg, "full", None, "cpu")
    checkpoint.load(checkpoint.latest(tmp_path / "run"), model, train.build_optimizer(model, 0.1))
    tops = [
        train.evaluate(
            cfg, model, build(backend, root, "val", 100, num_classes=10).epoch(0), torch.device("cpu")
        )["val_top1"]
        for backend, root in (("ffcv", tmp_path), ("folder", tmp_path / "tree"))
    ]
    print(f"top-1: {tops[0]:.2f} from .beton JPEGs, {tops[1]:.2f} from the originals")
    assert tops[0] == last["val_top1"] and abs(tops[0] - tops[1]) <= 0.2
