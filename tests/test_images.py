"""data/images.py: which files of a tree are its images and classes, for the writer and for both loaders."""

import hashlib
import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_beton import at_28_pixels, photo, save  # noqa: F401
from test_data import BACKENDS, equal, needs_ffcv, within
from test_rgb import clip_art

from config.checks import check_same_classes
from data.beton import main, parse_split, read_about, read_samples
from data.images import ImageTree, open_dataset, split_tree
from data.loader import build_loader
from errors import UserError


def make_tree(root, classes=("ant", "bee"), images=4):
    """Small images, of `classes`, each another one."""
    for label, name in enumerate(classes):
        for i in range(images):
            save(photo(40, 44, 100 * label + i), root / name / f"{i}.png")
    return root


@pytest.fixture
def tree(tmp_path):
    """train and val of two classes, four images in each."""
    for split in ("train", "val"):
        make_tree(tmp_path / "data" / split)
    return tmp_path / "data"


def write(tree, *flags):
    """data.beton of a tree, beside it. Its exit status."""
    return within(60, main, [str(tree), f"{tree}.beton", "--mode", "raw", "--workers", "1", *flags])


def build(backend, root, split="val", num_classes=2, image_size=None):
    return build_loader(
        backend, "imagenet", root, split, 2, 0, num_workers=1, num_classes=num_classes, image_size=image_size
    )


# ---- pictures


@needs_ffcv
def test_both_loaders_see_the_same_pictures(tree, at_28_pixels):  # noqa: F811
    """Of what is transparent, and of 16 bits."""
    shutil.rmtree(tree / "val")
    large = clip_art().resize((40, 40), Image.Resampling.NEAREST)
    save(large, tree / "val/ant/clip.png")
    save(large.convert("LA"), tree / "val/ant/grey clip.png")
    ramp = np.arange(1600).reshape(40, 40).astype(np.uint16)
    save(Image.fromarray(ramp), tree / "val/bee/dark.png")
    save(Image.fromarray(ramp * 40), tree / "val/bee/deep.png")
    assert write(tree / "val") == 0
    batches = list(build("folder", tree).epoch(0))
    assert equal(build("ffcv", tree).epoch(0), batches)
    clip, grey, dark, deep = [image.float() for images, _ in batches for image in images]
    for drawing in (clip, grey):
        assert drawing[:, 14, 0].tolist() == [255] * 3 and drawing[:, 14, 14].tolist() == [0] * 3
    assert 0 < dark.max() <= 6 and 200 < deep.max() < 250


@needs_ffcv
def test_images_that_were_made_smaller_than_asked_for_are_said(tree, at_28_pixels):  # noqa: F811
    assert write(tree / "val", "--max_resolution", "40") == 0
    assert not build("ffcv", tree).notes  # control: 28 pixels out of 32
    notes = build("ffcv", tree, image_size=56).notes
    assert notes == [
        f"{tree}/val.beton holds images of 40 pixels a side at most, which are enlarged: evaluation at 56 "
        "takes them at 64 (data.beton --max_resolution)"
    ]


@needs_ffcv
def test_images_of_one_colour_are_counted(tree, capsys):
    save(Image.new("RGB", (9, 7), (1, 2, 3)), tree / "val/bee/blank.png")
    save(Image.new("L", (1, 1)), tree / "val/bee/dot.png")
    spot = Image.new("RGB", (9, 7), (1, 2, 3))
    spot.putpixel((8, 6), (1, 2, 4))
    save(spot, tree / "val/ant/a spot.png")
    assert write(tree / "val") == 0
    said = capsys.readouterr().err
    assert f"val.beton: 2 of 11 images are one single colour, the first {tree}/val/bee/blank.png\n" in said
    assert write(tree / "train") == 0
    assert "single colour" not in capsys.readouterr().err


@needs_ffcv
def test_images_beyond_pillows_limits(tree, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="--trust_images reads it.*; replace or remove the file, or train"):
        list(build("folder", tree).epoch(0))
    assert write(tree / "val") == 1
    assert "--trust_images reads it" in capsys.readouterr().err
    assert write(tree / "val", "--trust_images") == 0
    assert len(read_samples(tree / "val.beton")) == 8


# ---- which files, which classes


def litter(root):
    """What file managers, notebooks and archives leave behind, and what is no picture."""
    for name in (".ipynb_checkpoints", "__MACOSX", "ant/.ipynb_checkpoints", "ant/deep/.cache/x/y", "@eaDir"):
        save(photo(40, 44, 0), root / name / "0.png")
    save(photo(40, 44, 0), root / "ant/deep/1.png")  # this one is an image
    for name in ("._0.png", "Thumbs.db", "paper.pdf", "film.mpg", "array.h5", "page.eps"):
        (root / "bee" / name).write_bytes(b"x")
    return [f"{root}/.ipynb_checkpoints", 11]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_image_is_left_alone_and_said(tree, backend, capsys):
    first, count = litter(tree / "val")
    shutil.copy(tree / "val/ant/0.png", tree / "val/loose.png")
    sentences = [
        f"{tree}/val: left alone, hidden or with a name of no image format: "
        f"{count} files or folders, the first {first}",
        f"{tree}/val: left alone, beside the class folders and in none of them: "
        f"1 images, the first {tree}/val/loose.png",
    ]
    if backend == "ffcv":
        assert write(tree / "val") == 0
        assert [line for line in capsys.readouterr().err.splitlines() if "left alone" in line] == sentences
        assert read_about(tree / "val.beton").classes == ["ant", "bee"]
    loader = build(backend, tree)
    assert (loader.num_samples, loader.classes) == (9, ["ant", "bee"])
    if backend == "folder":
        assert loader.notes == sentences
        assert build(backend, tree, "train").notes == []  # control


def test_images_are_in_torchvisions_order(tree):
    from torchvision.datasets import ImageFolder

    for name in ("ant/b", "ant/a/c", "ant/a-c", "bee/1"):
        make_tree(tree / "train" / name, [""], 2)
    os.symlink(tree / "val/bee", tree / "train/ant/linked")
    assert ImageTree(tree / "train").samples == ImageFolder(tree / "train").samples


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_class_is_refused_or_listed_first(tree, backend, capsys):
    """A folder that is no class must not become one by --num_classes 3."""
    (tree / "val/zebra").mkdir()
    if backend == "folder":
        with pytest.raises(UserError, match=f"{tree}/val: class folders without images: zebra: remove them"):
            build("folder", tree, num_classes=3)
        return
    assert write(tree / "val") == 1
    assert "class folders without images: zebra" in capsys.readouterr().err
    assert write(tree / "val", "--skip_bad") == 0
    with pytest.raises(UserError, match=r"has 3 classes, expected 2: .*: zebra \(no image\), ant, bee$"):
        build("ffcv", tree)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_number_of_classes_lists_them(tree, backend):
    if backend == "ffcv":
        assert write(tree / "val") == 0
    with pytest.raises(UserError, match="expected 1000: say --num_classes 2 if all .* meant: ant, bee$"):
        build(backend, tree, num_classes=1000)
    with pytest.raises(UserError, match="only train has c10, .* and 2 more; only val has d$"):
        check_same_classes("data", [f"c{i}" for i in range(10, 22)] + ["e"], ["d", "e"])


@needs_ffcv
def test_classes_that_skip_bad_emptied(tree, capsys):
    for path in (tree / "val/bee").iterdir():
        path.write_bytes(b"x")
    assert write(tree / "val", "--skip_bad") == 0
    said = capsys.readouterr().err
    assert "4 of 8 images were left out" in said and "no image is of these classes: bee\n" in said


# ---- links


LOOPS = {  # a link, and where it goes
    "up": ("train/ant/up", ".."),
    "itself": ("train/ant/again", "."),
    "a class": ("train/self", "."),
    "above the tree": ("train/ant/top", "../../.."),
    "there and back": ("train/ant/there", "../../elsewhere"),  # which holds a link back
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LOOPS)
def test_a_folder_within_itself_is_refused(tree, backend, kind, capsys):
    link, target = LOOPS[kind]
    make_tree(tree / "elsewhere", ["x"], 1)
    os.symlink("../train/ant", tree / "elsewhere/back")
    os.symlink(target, tree / link)
    named = f"{tree / link}/back" if kind == "there and back" else tree / link
    real = tree / "train/ant" if kind == "there and back" else os.path.realpath(tree / link)
    says = f"{named} is a link to {real}, a folder that it lies in itself: remove it"
    if backend == "ffcv":
        assert write(tree / "train") == 1
        assert says in capsys.readouterr().err and not (tree / "train.beton").exists()
        return
    with pytest.raises(UserError, match=says):
        within(20, build, "folder", tree, "train")


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_links_are_followed(tree, backend):
    """To a folder elsewhere, to another class, to an image, of a class, and the tree itself by a link."""
    make_tree(tree / "elsewhere", ["x"], 3)
    os.symlink("../../elsewhere", tree / "train/ant/more")
    os.symlink("../bee", tree / "train/ant/bees")
    os.symlink("../../elsewhere/x/0.png", tree / "train/bee/linked.png")
    os.symlink("../elsewhere/x", tree / "train/cow")
    os.symlink("train", tree / "val2")
    shutil.rmtree(tree / "val")
    (tree / "val2").rename(tree / "val")
    if backend == "ffcv":
        assert write(tree / "val") == 0
    loader = build(backend, tree, num_classes=3)
    assert loader.num_samples == 4 + 3 + 5 + 5 + 3 and loader.classes == ["ant", "bee", "cow"]


def test_a_link_to_itself_is_no_folder(tree):
    for name in ("train/loop", "train/ant/loop"):
        os.symlink("loop", tree / name)
    assert len(ImageTree(tree / "train")) == 8
    os.symlink("gone", tree / "train/ant/gone.png")  # and this one is an image by its name
    with pytest.raises(UserError, match="gone.png cannot be read as an image: .*No such file"):
        [image for image, _ in ImageTree(tree / "train")]


# ---- no tree at all


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flat_folder_is_told_apart(tmp_path, backend, capsys):
    """As ILSVRC2012's validation images are unpacked by tar, and as other people's lie."""
    root = tmp_path / "my data"
    cases = {
        "ILSVRC2012_val_0000000{}.JPEG": f"move {root}/val away, put ILSVRC2012_img_val.tar and "
        f"ILSVRC2012_devkit_t12.tar.gz, which knows their classes, into {root} and run "
        f"`python -m data.beton imagenet:val val.beton --root '{root}'`, which unpacks them",
        "{}.jpg": f"put those of each class into a folder of its name, {root}/val/CLASS/IMAGE.jpg",
    }
    for name, way_out in cases.items():
        for i in (1, 2):
            save(photo(20, 20, i), root / "val" / name.format(i))
        first = root / "val" / name.format(1)
        says = f"{root}/val holds 2 images, the first {first}, and no class folders with images: {way_out}"
        for source in (["imagenet:val", "--root", str(root)], [str(root / "val")]):
            if backend == "ffcv":
                assert main([source[0], str(tmp_path / "out.beton"), *source[1:]]) == 1
                assert capsys.readouterr().err == f"error: {says}\n"
            else:
                with pytest.raises(UserError) as refused:
                    build("folder", root)
                assert str(refused.value) == says
        shutil.rmtree(root / "val")


@pytest.mark.parametrize("places", ["{0}.tar", "{0}/{0}.tar"])
def test_tars_that_are_still_packed(tmp_path, places):
    for name in ("n01440764", "n01443537"):
        path = tmp_path / "train" / places.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    says = f"{tmp_path}/train holds 2 .tar files, .*: unpack each .* put ILSVRC2012_img_train.tar into"
    with pytest.raises(UserError, match=says + f" {tmp_path} and run `python -m data.beton imagenet:train "):
        open_dataset("imagenet", tmp_path, "train")


# ---- the split of one tree


def get_names(tree):
    return {os.path.relpath(path, tree.root) for path, _ in tree.samples}


def test_a_split_moves_no_image(tree, tmp_path):
    """Not with the tree, not by other images, and by other shares in one direction only."""
    make_tree(tree / "all", images=100)
    parts = split_tree(ImageTree(tree / "all"), Fraction("0.8"))
    train, val = get_names(parts["train"]), get_names(parts["val"])
    assert not train & val and len(train | val) == 200 and 20 < len(val) < 60
    assert parts["train"].classes == parts["val"].classes == ["ant", "bee"]
    assert parts["val"].targets == [label for _, label in parts["val"].samples]
    # Once and for all: what another version puts into train must not be in this one's val.
    numbers = [4, 6, 11, 32, 34, 39, 44, 49, 52, 53, 69, 76, 93]
    assert {name for name in val if name.startswith("ant/")} == {f"ant/{i}.png" for i in numbers}
    larger = get_names(split_tree(ImageTree(tree / "all"), Fraction("0.9"))["train"])
    assert train < larger
    (tree / "all").rename(tmp_path / "moved")
    make_tree(tmp_path / "moved", ["cow"], 50)
    for path in list((tmp_path / "moved/bee").iterdir())[:50]:
        path.unlink()
    again = split_tree(ImageTree(tmp_path / "moved"), Fraction("0.8"))
    there = {name for name in train | val if (tmp_path / "moved" / name).exists()}
    assert len(there) == 150 and get_names(again["train"]) & there == train & there


@needs_ffcv
def test_both_parts_are_written(tree, tmp_path, capsys):
    root, out = make_tree(tree / "all", ["ant", "bee"], 12), tmp_path / "out"
    rare = next(i for i in range(100) if is_for_training(f"rare/{i}.png"))
    save(photo(40, 44, 0), root / f"rare/{rare}.png")
    bad = {True: [], False: []}
    for i in range(4):
        (root / f"bee/bad{i}.png").write_bytes(b"x")
        bad[is_for_training(f"bee/bad{i}.png")].append(f"{root}/bee/bad{i}.png")
    assert bad[True] and bad[False]
    flags = ["--split", "0.7/0.3", "--mode", "raw", "--workers", "1"]
    assert main([str(root), str(out), *flags]) == 1
    assert "bad" in capsys.readouterr().err and list(out.iterdir()) == []
    assert main([str(root), str(out), *flags, "--skip_bad"]) == 0
    said = capsys.readouterr().err
    assert f"{out}/val.beton: no image is of these classes: rare\n" in said and "train.beton: no" not in said
    numbers = []
    for part, is_train in (("train", True), ("val", False)):
        index = json.loads((out / f"{part}.json").read_text())
        assert index["classes"] == ["ant", "bee", "rare"]
        skipped = (out / f"{part}.skipped.txt").read_text().splitlines()
        assert [line.split(" cannot")[0] for line in skipped] == bad[is_train]
        numbers.append(len(read_samples(out / f"{part}.beton")))
    assert sum(numbers) == 25 and min(numbers) > 3
    assert len(list(out.iterdir())) == 6
    assert build("ffcv", out, num_classes=3).num_samples == numbers[1]


def is_for_training(name, share=Fraction("0.7")):
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return number < share * 2**64


@needs_ffcv
def test_a_split_that_fails_leaves_the_old_files(tree, tmp_path, capsys):
    """Both: with one of them new, images could be in train and in val."""
    root, out = make_tree(tree / "all", images=12), tmp_path / "out"
    assert main([str(root), str(out), "--split", "0.7/0.3"]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    bad = next(i for i in range(100) if not is_for_training(f"ant/bad{i}.png", Fraction("0.9")))
    (root / f"ant/bad{bad}.png").write_bytes(b"x")
    assert main([str(root), str(out), "--split", "0.9/0.1"]) == 1
    assert f"bad{bad}.png cannot be read" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    "split", ["0.9", "0.9/0.2", "1/0", "-1/2", "90/10", "a/b", "nan/0", "0.8/0.1/0.1", "", "/"]
)
def test_shares_that_are_none(split):
    with pytest.raises(UserError, match="expected two shares above 0 that add up to 1, 0.9/0.1 say"):
        parse_split(split)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["TREE", "out.beton", "--split", "0.9/0.1"], "with --split OUT is a folder"),
        (["TREE", "out", "--split", "0.9/0.2"], "expected two shares"),
        (["TREE", "out", "--split", "0.9999999999/0.0000000001"], "val gets none of 8 images"),
        (["TREE", "out"], "expected a name that ends in .beton"),
    ],
)
def test_mistakes_with_a_split(tree, tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("TREE", str(tree / "train")) for argument in argv]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["data"]
