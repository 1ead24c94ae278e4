"""miniImageNet (Ravi and Larochelle, 2017) and tieredImageNet (Ren et al., 2018) are classes of ILSVRC 2012's images.

miniImageNet is 600 images of each of 64/16/20 classes; tieredImageNet all of 351/97/160, split by superclass.
"""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from preprocess import array_files, class_archives
from preprocess.sources import DataSet, Published, Source, split_of_classes
from preprocess.staging import SPLITS
from preprocess.writing import Picture
from utils.errors import UserError

log = logging.getLogger(__name__)

FOLDER = "ImageNet"
METAOPTNET = "https://github.com/kjunelee/MetaOptNet"
ZENODO = "https://zenodo.org/records/7978538/files/"  # learn2learn's copies of both data sets as Ren et al. have them
REN = "https://github.com/renmengye/few-shot-ssl-public"


def linked(name: str, images_per_class: int | None, archives: Path) -> Iterator[Picture]:
    """Yield links to the first images by name of each class, or to all, of ImageNet in class folders.

    A warning says how many classes have none, as most have in a sample. UserError where no class has any.
    """
    root = archives / FOLDER
    root = root / "train" if (root / "train").is_dir() else root
    split_of = split_of_classes(name)
    missing = []
    for class_name, split in split_of.items():
        paths = (root / class_name).glob("[!.]*")
        files = sorted(path for path in paths if path.suffix.lower() in (".jpeg", ".jpg"))
        missing += [] if files else [class_name]
        for file in files[:images_per_class]:
            yield Picture(split, class_name, file.name, file.absolute())
    if missing:
        lacks = f"{root} has no {missing[0]}/*.JPEG; it lacks {len(missing)} of the {len(split_of)} classes of {name}"
        if len(missing) == len(split_of):
            raise UserError(f"{lacks}: add them")
        log.warning(lacks)


def _folders(name: str, images_per_class: int | None) -> Source:
    which = f"the first {images_per_class}" if images_per_class else "all"
    origin = (
        "the training images of ILSVRC 2012, or a link to them, as ImageNet/nXXXXXXXX/*.JPEG or ImageNet/train/…; "
        f"{which} of each class are linked, not copied: https://image-net.org"
    )
    return Source((FOLDER,), origin, partial(linked, name, images_per_class))


MINI_IMAGENET = DataSet(
    "mini_imagenet",
    (
        class_archives.source(
            "mini_imagenet_full_size.tar.bz2",
            "the class folders of MAML++, images at full size: "
            "https://github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch",
        ),
        array_files.source(
            f"MetaOptNet's pickles, 84x84: {METAOPTNET}",
            array_files.data_and_labels,
            "miniImageNet_category_split_{}.pickle",
            train="train_phase_train",
        ),
        array_files.source(
            f"the pickles of Ren et al., 84x84: {REN}, https://www.kaggle.com/datasets/whitemoon/miniimagenet",
            array_files.image_data_and_class_dict,
            "mini-imagenet-cache-{}.pkl",
        )._replace(
            addresses={
                f"mini-imagenet-cache-{split}.pkl": (f"{ZENODO}mini-imagenet-cache-{word}.pkl",)
                for split, word in {"train": "train", "val": "validation", "test": "test"}.items()
            }
        ),
        _folders("mini_imagenet", 600),
    ),
    Published({"train": 64, "val": 16, "test": 20}, 600),
)
TIERED_IMAGENET = DataSet(
    "tiered_imagenet",
    (
        array_files.source(
            f"MetaOptNet's arrays, 84x84: {METAOPTNET}",
            array_files.npz_and_labels,
            *("{}_images.npz", "{}_labels.pkl"),
        ),
        array_files.source(
            f"the pickles of Ren et al., 84x84: {REN}",
            array_files.pngs_and_labels,
            *("{}_images_png.pkl", "{}_labels.pkl"),
        )._replace(
            addresses={
                f"{split}_{file}": (f"{ZENODO}tiered-imagenet-{split}_{file}",)
                for split in SPLITS
                for file in ("images_png.pkl", "labels.pkl")
            }
        ),
        _folders("tiered_imagenet", None),
    ),
    Published({"train": 351, "val": 97, "test": 160}, {"train": 448_695, "val": 124_261, "test": 206_209}),
)
DATA_SETS = (MINI_IMAGENET, TIERED_IMAGENET)
