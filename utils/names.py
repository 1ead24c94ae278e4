"""Forgiving data-set names: CIFAR-FS, CIFAR_FS and cifar_fs are one data set, everywhere."""

from pathlib import Path

from utils.errors import UserError

KNOWN = (
    "mini_imagenet", "tiered_imagenet", "CIFAR_FS", "FC100", "CUB",
    "omniglot", "glyphs", "glyphs_colour", "digits",
)  # fmt: skip


def _fold(name: str) -> str:
    """The name without case, '-', '_' and ' '; the American spelling of colour counts as ours."""
    folded = name.lower().translate(str.maketrans("", "", "-_ "))
    return "glyphscolour" if folded == "glyphscolor" else folded


_CANONICAL = {_fold(name): name for name in KNOWN} | {
    "omniglotdataset": "omniglot", "miniimagenetfullsize": "mini_imagenet",  # as MAML++'s configurations have them
}  # fmt: skip


def canonical_name(name: str) -> str:
    """The one spelling used for folders and results; a name that is not known comes back unchanged."""
    return _CANONICAL.get(_fold(name), name)


def find_dataset(dataset_dir: Path, name: str) -> Path:
    """The folder of data set `name`, however it is spelt; where there is none, the path at which it belongs.

    A folder spelt exactly like `name` wins. UserError where only other spellings exist, and several of them.
    """
    exact = dataset_dir / name
    if exact.is_dir() or not dataset_dir.is_dir():
        return exact if exact.is_dir() else dataset_dir / canonical_name(name)
    spellings = {_fold(name), _fold(canonical_name(name))}
    folders = [path for path in dataset_dir.iterdir() if _fold(path.name) in spellings and path.is_dir()]
    if len(folders) > 1:
        spelt = " and ".join(sorted(path.name for path in folders))
        raise UserError(f"{name!r} could be {spelt}, both in {dataset_dir}: give the exact name of one of them")
    return folders[0] if folders else dataset_dir / canonical_name(name)
