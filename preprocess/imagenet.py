"""miniImageNet (Ravi and Larochelle, 2017) and tieredImageNet (Ren et al., 2018): classes of ILSVRC 2012, training set.

miniImageNet is 600 images of each of 64/16/20 classes; tieredImageNet all of 351/97/160, split by superclass.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from preprocess import array_files, class_archives
from preprocess.sources import Published, Recipe, Source, of_pictures, read_split
from preprocess.writing import Picture
from utils.errors import UserError

FOLDER = "ImageNet"
MINI = Published({"train": 64, "val": 16, "test": 20}, 600)
TIERED = Published(
    {"train": 351, "val": 97, "test": 160},
    {"train": 448_695, "val": 124_261, "test": 206_209},
)


def linked(name: str, images_per_class: int | None, archives: Path) -> Iterator[Picture]:
    """Links to the first images by name of each class, or to all, of ImageNet in class folders.

    Prints how many classes have none, as most have in a sample. UserError where no class has any.
    """
    root = archives / FOLDER
    root = root / "train" if (root / "train").is_dir() else root
    split_of = {class_name: split for split, classes in read_split(name).items() for class_name in classes}
    missing = []
    for class_name, split in split_of.items():
        files = _jpegs(root / class_name)
        missing += [] if files else [class_name]
        for file in files[:images_per_class]:
            yield Picture(split, class_name, file.name, file.absolute())
    if missing:
        lacks = f"{root} has no {missing[0]}/*.JPEG; it lacks {len(missing)} of the {len(split_of)} classes of {name}"
        if len(missing) == len(split_of):
            raise UserError(f"{lacks}: add them")
        print(f"note: {lacks}")


def _jpegs(folder: Path) -> list[Path]:
    """By name; none where there is no such folder."""
    suffixes = (".jpeg", ".jpg")
    return sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in suffixes)


def _folders(name: str, images_per_class: int | None, published: Published) -> Source:
    which = f"the first {images_per_class}" if images_per_class else "all"
    origin = (
        "the training images of ILSVRC 2012, or a link to them, as ImageNet/nXXXXXXXX/*.JPEG or ImageNet/train/…; "
        f"{which} of each class are linked, not copied: https://image-net.org"
    )
    return of_pictures(name, (FOLDER,), origin, partial(linked, name, images_per_class), published.total)


MINI_IMAGENET = Recipe(
    (
        class_archives.source(
            "mini_imagenet",
            "mini_imagenet_full_size.tar.bz2",
            "the class folders of MAML++, images at full size: "
            "https://github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch",
            MINI.total,
        ),
        array_files.source(
            "mini_imagenet",
            array_files.each_split("miniImageNet_category_split_{}.pickle")
            | {"train": ["miniImageNet_category_split_train_phase_train.pickle"]},
            array_files.data_and_labels,
            "MetaOptNet's pickles, 84x84: https://github.com/kjunelee/MetaOptNet",
            MINI.total,
        ),
        array_files.source(
            "mini_imagenet",
            array_files.each_split("mini-imagenet-cache-{}.pkl"),
            array_files.image_data_and_class_dict,
            "the pickles of Ren et al., 84x84: https://github.com/renmengye/few-shot-ssl-public, "
            "https://www.kaggle.com/datasets/whitemoon/miniimagenet",
            MINI.total,
        ),
        _folders("mini_imagenet", 600, MINI),
    ),
    MINI,
)

TIERED_IMAGENET = Recipe(
    (
        array_files.source(
            "tiered_imagenet",
            array_files.each_split("{}_images.npz", "{}_labels.pkl"),
            array_files.npz_and_labels,
            "MetaOptNet's arrays, 84x84: https://github.com/kjunelee/MetaOptNet",
            TIERED.total,
        ),
        array_files.source(
            "tiered_imagenet",
            array_files.each_split("{}_images_png.pkl", "{}_labels.pkl"),
            array_files.pngs_and_labels,
            "the pickles of Ren et al., 84x84: https://github.com/renmengye/few-shot-ssl-public",
            TIERED.total,
        ),
        _folders("tiered_imagenet", None, TIERED),
    ),
    TIERED,
)
