"""The table of data sets. It says what is done to their images; data/ffcv.py and data/folder.py know how."""

from dataclasses import dataclass
from typing import NamedTuple


class DatasetSpec(NamedTuple):
    """What a data set is, and how its images become batches, whichever loader makes them."""

    image_size: int  # pixels, height and width
    num_classes: int  # unless Config says otherwise
    mean: tuple[float, float, float]  # of each channel, for normalise
    std: tuple[float, float, float]
    min_area: float  # training: random crops of this share of the area to all of it; 0 = as in evaluation
    short_side: int  # evaluation: the shorter side is resized to this, then the middle is cut out
    augmentations: tuple[tuple, ...]  # training, after the crop, in order: (name, its arguments …)


def get_spec(dataset: str, image_size: int | None = None) -> DatasetSpec:
    """A row of DATASETS, its images made `image_size` pixels high and wide; None: as in the row.

    Evaluation's short_side keeps its proportion to that, rounded to whole pixels: ImageNet's 256 for 224 are
    183 for 160 and 439 for 384. Other augmentations stay as they are, in pixels too.
    """
    spec = DATASETS[dataset]
    if image_size is None:
        return spec
    short_side = round(spec.short_side * image_size / spec.image_size)
    return spec._replace(image_size=image_size, short_side=short_side)


# fmt: off
DATASETS = {  # mean and std as in the ViT papers' own preprocessing, pixels to [-1, 1]
    "fashion_mnist": DatasetSpec(28, 10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0, 28, (("shift", 1), ("flip",))),
    # or any other tree of class folders, with --num_classes
    "imagenet": DatasetSpec(224, 1000, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.05, 256, (("flip",),)),
}
# fmt: on


@dataclass(frozen=True)
class LoaderOptions:
    """What build_loader tells a loader."""

    dataset: str  # a name in DATASETS
    spec: DatasetSpec  # that row, with the images' size asked for
    data_dir: str
    split: str  # "train" or "val"
    batch_size: int  # of this process
    seed: int
    num_workers: int | None  # threads or processes; None = the CPUs there are
    num_samples: int | None  # train on a random subset of so many images
    num_classes: int
    augmentations: tuple[tuple, ...]  # spec's, and what was asked for besides; none in evaluation
    world_rank: int = 0
    world_size: int = 1

    @property
    def train(self) -> bool:
        return self.split == "train"
