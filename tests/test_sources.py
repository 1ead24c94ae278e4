"""Every archive form of every data set, from archive to class folders: the right images, all of them, or an error."""

import hashlib
import io
import itertools
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocess import array_files, cifar100, imagenet, omniglot, staging
from preprocess.preprocess import main, prepare
from preprocess.sources import DataSet, Published, Source, check, choose, note, note_checksums, read_split
from preprocess.staging import SPLITS, Contents
from preprocess.writing import write_images
from tests.made_archives import encoded, left_in, mapped, pack, pixels, png
from utils.errors import UserError
from utils.image_cache import open_split

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = {"train": 3, "val": 2, "test": 2}  # classes of a small data set, of 4 images each
LABELS = {"train": [0, 2, 5], "val": [1, 3], "test": [4, 6]}  # as MetaOptNet numbers them


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images_in(folder: Path) -> dict[str, np.ndarray]:
    """(H, W, 3) of each image file, by SPLIT/CLASS/FILE."""
    return {str(path.relative_to(folder)): np.asarray(Image.open(path).convert("RGB")) for path in folder.glob("*/*/*")}


def counts(folder: Path) -> dict[str, dict[str, int]]:
    return {split: dict(sorted(classes.items())) for split, classes in staging.count_images(folder).items()}


def class_folders(prefix: str = "x/", per_class: int = 4) -> dict[str, bytes]:
    """Member name -> PNG, of a data set of the sizes above."""
    return {
        f"{prefix}{split}/{split}{k}/{i}.png": png(100 * k + i)
        for split, classes in SAMPLE.items()
        for k in range(classes)
        for i in range(per_class)
    }


# ---------------------------------------------------------------- class folders in any archive


@pytest.mark.parametrize(
    "name", ["birds.zip", "birds.tar", "birds.tar.gz", "birds.tgz", "birds.tar.bz2", "birds.tar.xz"]
)
@pytest.mark.parametrize("prefix", ["", "./", "some/where/"])
def test_any_archive_of_class_folders_becomes_a_data_set(tmp_path: Path, name: str, prefix: str) -> None:
    files = class_folders(prefix)
    extra = {
        f"{prefix}README.md": b"hello",
        f"{prefix}train/.DS_Store": b"x",
        f"{prefix}train/train0/Icon\r": b"",
        f"{prefix}train/train0/desktop.ini": b"x",
        f"__MACOSX/{prefix}train/n/._0.png": b"x",
        f"__MACOSX/{prefix}train/n/0.png": png(0),
    }
    pack(tmp_path / name, files | extra)
    found = files_in(prepare("birds", tmp_path))
    del found[staging.CONTENTS_FILE]
    assert found == {member.removeprefix(prefix): content for member, content in files.items()}


def test_the_real_class_folders_at_64_pixels_become_a_data_set_grey_jpegs_too(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny_tiered_64.zip").symlink_to(shared / "data" / "tiny_tiered_64_small.zip")
    command = [
        sys.executable,
        "preprocess/preprocess.py",
        "--datasets",
        "tiny_tiered_64",
        "--dataset_dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "train 8 classes, 320 images; val 5 classes, 200 images; test 6 classes, 240 images" in done.stdout
    assert done.stderr == ""  # no progress bar where nobody watches
    archive = zipfile.ZipFile(tmp_path / "tiny_tiered_64.zip")
    found = files_in(tmp_path / "tiny_tiered_64")
    assert len(found) == 761
    for name in archive.namelist():
        assert found[name.removeprefix("tiny_tiered_64/")] == archive.read(name)
    assert {Image.open(io.BytesIO(content)).mode for name, content in found.items() if name.endswith("JPEG")} == {
        "RGB",
        "L",
    }
    known = json.loads((shared / "facts" / "tiny_tiered_split.json").read_text())
    assert all(set(classes) <= set(known[split]) for split, classes in counts(tmp_path / "tiny_tiered_64").items())


def test_a_class_called_train_and_equal_file_names_in_two_classes_are_kept_apart(tmp_path: Path) -> None:
    members = {f"x/{split}/{name}/0.png": png(k) for k, (split, name) in enumerate(
        [("train", "train"), ("train", "val"), ("train", "a"), ("val", "b"), ("test", "test")])}  # fmt: skip
    pack(tmp_path / "x.zip", members)
    found = files_in(prepare("x", tmp_path))
    assert (
        found["train/train/0.png"] == png(0)
        and found["train/val/0.png"] == png(1)
        and found["test/test/0.png"] == png(4)
    )
    assert found["train/a/0.png"] == png(2) and len(found) == 6


def test_grey_cmyk_and_turned_jpegs_reach_the_cache_upright_and_in_colour(tmp_path: Path) -> None:
    scene = np.zeros((16, 16, 3), np.uint8)
    scene[:8, :, 0] = 250  # red above, black below
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    jpegs = {
        "cmyk": Image.fromarray(scene).convert("CMYK"),
        "grey": Image.fromarray(scene[..., 0]),
        "turned": Image.fromarray(np.rot90(scene).copy()),
    }
    members: dict[str, bytes] = {}
    for kind, image in jpegs.items():
        out = io.BytesIO()
        image.save(out, "JPEG", quality=95, **({"exif": turned} if kind == "turned" else {}))
        members |= {f"x/{split}/{split}_{kind}/0.JPEG": out.getvalue() for split in SPLITS}
    pack(tmp_path / "x.tar", members)
    prepare("x", tmp_path)
    split = open_split(tmp_path, "x", "train", (3, 16, 16), workers=1)
    assert split.class_names == ["train_cmyk", "train_grey", "train_turned"]
    for image, above in zip(split.images, ((250, 0, 0), (250, 250, 250), (250, 0, 0)), strict=True):
        assert np.abs(image[2:6, 2:-2].mean((0, 1)) - above).max() < 12 and image[10:14, 2:-2].mean() < 12


def test_images_that_cannot_be_read_are_named_all_of_them_and_nothing_is_kept(tmp_path: Path) -> None:
    files = class_folders()
    names = list(files)
    big = encoded(pixels(1, 64), "JPEG")
    bad = {
        names[0]: b"",
        names[5]: b"<html>not found</html>",
        names[9]: png(3)[:60],
        "x/val/val0/cut.JPEG": big[: len(big) // 2],
    }
    (tmp_path / "x.zip").write_bytes(pack(tmp_path / "y.zip", files | bad).read_bytes())
    with pytest.raises(UserError, match="x: 4 images cannot be read: ") as error:
        prepare("x", tmp_path)
    for name in bad:
        assert name.removeprefix("x/") in str(error.value)
    assert "val/val0/cut.JPEG (OSError: image file is truncated" in str(error.value) and "skip_bad_images" in str(
        error.value
    )
    assert left_in(tmp_path) == [] and (tmp_path / "x.zip").is_file()


def test_an_archive_without_class_folders_says_what_it_needs(tmp_path: Path) -> None:
    pack(tmp_path / "x.zip", {"x/a/0.png": png(0), "train/0.png": png(0)})
    needed = r"x\.zip has no images at …/{train,val,test}/CLASS/IMAGE"
    with pytest.raises(UserError, match=needed + r".* 2 elsewhere, such as 'x/a/0\.png': unpack it .*--from_folder"):
        prepare("x", tmp_path)
    pack(tmp_path / "x.zip", {"x/readme.txt": b""})
    with pytest.raises(UserError, match=needed + r".*, so it is not an archive of class folders[^:]*$"):
        prepare("x", tmp_path)


@pytest.mark.parametrize("words", [("Train", "valid", "TEST"), ("train", "validation", "test")])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_splits_may_be_spelt_otherwise_and_folders_with_backslashes(
    tmp_path: Path, words: tuple[str, ...], slash: str
) -> None:
    word = dict(zip(SPLITS, words, strict=True))
    files = {
        slash.join(["x", word[split], *rest]): content
        for name, content in class_folders("").items()
        for split, *rest in [name.split("/")]
    }
    pack(tmp_path / "x.zip", files)
    found = files_in(prepare("x", tmp_path))
    del found[staging.CONTENTS_FILE]
    assert found == class_folders("")


def test_images_that_lie_elsewhere_in_an_archive_are_counted_and_the_first_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {
        "x/train/train0/sub/9.png": png(9),
        "x/train/loose.JPG": png(1),
        "x/train/notes.txt": b"",
        "x/run.sh": b"",
    }
    pack(tmp_path / "x.zip", class_folders() | others)
    assert len(files_in(prepare("x", tmp_path))) == len(class_folders()) + 1
    assert "left out: 2 elsewhere, such as 'x/train/train0/sub/9.png'" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["n:x\\y", "..", "a/b"])
def test_a_class_name_that_is_no_plain_name_is_refused(tmp_path: Path, name: str) -> None:
    for split, label in (("train", 0), ("val", 1), ("test", 2)):
        content = {"data": np.stack([pixels(label)]), "labels": [label], "catname2label": {name: label}}
        (tmp_path / f"CIFAR_FS_{split}.pickle").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="cannot be the name of a class"):
        prepare("CIFAR_FS", tmp_path)
    assert left_in(tmp_path) == []


# ---------------------------------------------------------------- what was published


def full(classes: dict[str, int], images: int = 600) -> Contents:
    return {split: {f"{split}{k:03d}": images for k in range(number)} for split, number in classes.items()}


PUBLISHED = Published({"train": 64, "val": 16, "test": 20}, 600)


def test_contents_as_published_pass_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    check("CIFAR_FS", full(PUBLISHED.classes), PUBLISHED)
    totals = {"train": 38400, "val": 9600, "test": 12000}
    check("CIFAR_FS", full(PUBLISHED.classes), Published(PUBLISHED.classes, totals))
    assert capsys.readouterr().out == ""


def test_every_difference_from_what_was_published_is_stated() -> None:
    found = full({"train": 63, "val": 17, "test": 20})
    found["test"]["test007"] = 599
    with pytest.raises(UserError) as error:
        check("CIFAR_FS", found, PUBLISHED)
    for part in (
        "train has 63 classes, 1 fewer than 64", "val has 17 classes, 1 more than 16",
        "test/test007 has 599 images, 1 fewer than 600", "untouched",
    ):  # fmt: skip
        assert part in str(error.value)
    totals = {"train": 38401, "val": 9600, "test": 12000}
    with pytest.raises(UserError, match="train has 38400 images, 1 fewer than 38401"):
        check("x", full(PUBLISHED.classes), Published(PUBLISHED.classes, totals))
    with pytest.raises(UserError, match="; and 95 more"):
        check("x", full(PUBLISHED.classes, 599), PUBLISHED)


@pytest.mark.parametrize(
    ("classes", "images"),
    [
        ({"train": 64, "val": 15, "test": 19}, 1),
        ({"train": 60, "val": 15, "test": 19}, 100),
        ({"train": 9, "val": 9}, 9),
        ({"train": 63, "val": 15, "test": 19}, 1),
        ({"train": 33, "val": 8, "test": 10}, 1),
    ],
)
def test_what_lacks_a_little_of_what_was_published_is_no_sample(classes: dict[str, int], images: int) -> None:
    with pytest.raises(UserError, match="does not hold what was published"):
        check("CIFAR_FS", full(classes, images), PUBLISHED)


def test_a_small_sample_is_taken_and_called_so() -> None:
    sample = full({"train": 8, "val": 5, "test": 6}, 40)
    check("CIFAR_FS", sample, PUBLISHED)
    said = note("CIFAR_FS", sample, PUBLISHED)
    assert "a sample of CIFAR_FS, not the published data set: train has 8 classes, 56 fewer" in said
    assert "val has 5 classes" in said and "test has 6 classes" in said and said.endswith("; and 17 more")
    assert note("CIFAR_FS", full(PUBLISHED.classes), PUBLISHED) == ""
    other = note("CIFAR_FS", full({"train": 63, "val": 16, "test": 20}), PUBLISHED)
    assert "CIFAR_FS, but not the published data set: train has 63 classes" in other


def test_where_only_all_images_are_known_they_are_counted_together() -> None:
    published = Published(PUBLISHED.classes, {"all": 60_000})
    check("x", full(PUBLISHED.classes), published)
    with pytest.raises(UserError, match=r"published: it has 59900 images, 100 fewer than 60000\. "):
        check("x", full(PUBLISHED.classes, 599), published)


def test_a_class_in_two_splits_is_refused_for_any_data_set(tmp_path: Path) -> None:
    pack(tmp_path / "x.zip", class_folders() | {"x/test/train1/9.png": png(0)})
    with pytest.raises(UserError, match="class 'train1' of x is in train and in test: splits must not overlap"):
        prepare("x", tmp_path)
    assert left_in(tmp_path) == []


def test_an_archive_says_whether_it_is_the_published_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.zip").write_bytes(b"content")
    for md5, said in (
        (hashlib.md5(b"content").hexdigest(), "has its publisher's checksum"),
        ("0" * 32, "warning: x.zip is not"),
    ):
        note_checksums(Source(("x.zip",), "", lambda archives: (), {"x.zip": md5}), tmp_path)
        assert said in capsys.readouterr().out


# ---------------------------------------------------------------- which source is taken


FORMS = {
    "mini_imagenet": ["mini_imagenet_full_size.tar.bz2", "miniImageNet_category_split_train_phase_train.pickle",
                      "miniImageNet_category_split_val.pickle", "mini-imagenet-cache-test.pkl", "ImageNet/nXXXXXXXX"],
    "tiered_imagenet": ["tiered_imagenet.tar", "train_images.npz and train_labels.pkl", "val_images_png.pkl"],
    "CIFAR_FS": ["cifar100.zip", "bertinetto/r2d2", "cifar-100-python.tar.gz", "toronto.edu", "CIFAR_FS_train.pickle"],
    "FC100": ["cifar100.zip", "134 MB", "cifar-100-python.tar.gz", "169 MB", "FC100_test.pickle"],
    "CUB": ["CUB_200_2011.tgz"],
    "omniglot": ["images_background.zip and images_evaluation.zip", "brendenlake/omniglot"],
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_missing_archive_says_every_form_where_to_get_it_and_where_to_put_it(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--datasets", name, "--dataset_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{name} cannot be made: its archive is missing" in error and str(tmp_path) in error
    assert all(form in error for form in FORMS[name]) and "https://" in error
    assert error.endswith(f"  python preprocess/preprocess.py --datasets {name} --dataset_dir {tmp_path} --download\n")
    assert f"{name}.zip or {name}.tar or " in error and "class folders {train,val,test}/CLASS/*" in error
    assert left_in(tmp_path) == []


def test_an_incomplete_form_is_named_and_the_next_one_is_taken(tmp_path: Path) -> None:
    forms = tuple(Source(needs, "it", lambda archives: ()) for needs in (("a", "b"), ("c",), ("d",)))
    data_set = DataSet("x", forms)
    (tmp_path / "b").touch()
    with pytest.raises(UserError, match=rf"a and b \({tmp_path}/a is missing\)") as error:
        choose(data_set, tmp_path)
    assert "--download" not in str(error.value)  # none of them has an address
    (tmp_path / "d").touch()
    assert choose(data_set, tmp_path).needs == ("d",)
    (tmp_path / "c").touch()
    assert choose(data_set, tmp_path).needs == ("c",)


def test_archives_are_looked_for_before_the_first_data_set_is_made(tmp_path: Path) -> None:
    pack(tmp_path / "x.zip", class_folders())
    assert main(["--datasets", "x", "FC100", "--dataset_dir", str(tmp_path)]) == 2
    assert left_in(tmp_path) == []
    assert main(["--datasets", "x", "--dataset_dir", str(tmp_path)]) == 0
    assert left_in(tmp_path) == ["x"]


# ---------------------------------------------------------------- CIFAR-FS and FC100


@pytest.fixture
def small_zip(shared: Path, tmp_path: Path) -> zipfile.ZipFile:
    """The real small archive, in place at tmp_path/cifar100.zip."""
    (tmp_path / "cifar100.zip").write_bytes((shared / "data" / "cifar_fs_small.zip").read_bytes())
    return zipfile.ZipFile(tmp_path / "cifar100.zip")


def of_class(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """Class -> members."""
    found: dict[str, list[str]] = {}
    for name in archive.namelist():
        if cifar100.class_of(name):
            found.setdefault(cifar100.class_of(name), []).append(name)
    return found


@pytest.mark.parametrize("name", ["CIFAR_FS", "FC100"])
def test_one_zip_gives_cifar_fs_and_fc100(small_zip: zipfile.ZipFile, tmp_path: Path, name: str, shared: Path) -> None:
    split_file = {"CIFAR_FS": "cifar_fs_split", "FC100": "fc100_split"}[name]
    split_of = json.loads((shared / "facts" / f"{split_file}.json").read_text())
    expected = {
        f"{split}/{class_name}/{member.rpartition('/')[2]}": small_zip.read(member)
        for split, classes in split_of.items()
        for class_name in classes
        for member in of_class(small_zip).get(class_name, ())
    }
    found = files_in(prepare(name, tmp_path))
    del found[staging.CONTENTS_FILE]
    assert found == expected and len(found) == 760
    if name == "CIFAR_FS":  # as the archive's own split files have it
        for split in SPLITS:
            listed = small_zip.read(f"cifar100/splits/bertinetto/{split}.txt").decode().split()
            assert sorted(listed) == sorted({path.split("/")[1] for path in found if path.startswith(f"{split}/")})


def test_a_zip_without_cifars_layout_is_another_one(tmp_path: Path) -> None:
    pack(tmp_path / "cifar100.zip", {"cifar100/apple/0.png": png(0)})
    with pytest.raises(UserError, match=r"has no cifar100/data/CLASS/\*\.png. Fetch .*Bertinetto"):
        prepare("FC100", tmp_path)


@pytest.mark.parametrize(
    "repacked",
    [lambda name: f"./{name}", lambda name: f"CIFAR-FS/{name}", lambda name: name.partition("/")[2],
     lambda name: name.removesuffix("png") + "PNG", lambda name: name.replace("/", "\\")],
    ids=["dot", "below", "above", "capitals", "backslashes"],
)  # fmt: skip
def test_a_repacked_zip_of_cifar_and_what_macos_adds_to_it_are_understood(
    tmp_path: Path, repacked: Callable[[str], str]
) -> None:
    files = {f"cifar100/data/{names[0]}/{i}.png": png(i) for names in read_split("CIFAR_FS").values() for i in range(3)}
    files = {repacked(name): content for name, content in files.items()}
    extra = {repacked("cifar100/data/apple/._0.png"): b"x", f"__MACOSX/{repacked('cifar100/data/apple/7.png')}": b"x"}
    pack(tmp_path / "cifar100.zip", files | extra)
    found = files_in(prepare("CIFAR_FS", tmp_path))
    assert len(found) == 10 and set(found.values()) - {png(0), png(1), png(2)} == {found[staging.CONTENTS_FILE]}


def test_a_zip_member_of_cifar_that_is_no_image_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cifar100.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("noise", np.random.RandomState(0).bytes(2**20), zipfile.ZIP_STORED)
        archive.writestr("cifar100/data/apple/0.png", bytes(2**26 + 1))
    with pytest.raises(UserError, match=r"unpacks to 67 MB, more than it can need"):
        prepare("CIFAR_FS", tmp_path)


@pytest.mark.parametrize("folder", ["./cifar-100-python/", "", "CIFAR/cifar-100-python/"])
def test_a_repacked_official_archive_is_understood(tmp_path: Path, folder: str) -> None:
    names = [names[0] for names in read_split("FC100").values()]
    part = {"data": np.stack([pixels(i, 32) for i in range(3)]), "fine_labels": [0, 1, 2], "filenames": list("abc")}
    files = {"meta": {"fine_label_names": names}, "train": part, "test": part | {"filenames": list("def")}}
    pack(
        tmp_path / "cifar-100-python.tar.gz",
        {folder + name: pickle.dumps(content, 2) for name, content in files.items()},
    )
    assert counts(prepare("FC100", tmp_path)) == {split: {name: 2} for split, name in zip(SPLITS, names, strict=True)}


def test_fc100_has_no_superclass_in_two_splits(shared: Path) -> None:
    superclass = json.loads((shared / "facts" / "cifar100_superclasses.json").read_text())
    split = read_split("FC100")
    of_split = {name: {superclass[class_name] for class_name in classes} for name, classes in split.items()}
    assert {name: len(classes) for name, classes in split.items()} == {"train": 60, "val": 20, "test": 20}
    assert [len(of_split[name]) for name in SPLITS] == [12, 4, 4] and len(set.union(*of_split.values())) == 20
    assert Counter(class_name for classes in split.values() for class_name in classes) == Counter(
        dict.fromkeys(superclass, 1)
    )
    assert set(superclass) == {class_name for classes in read_split("CIFAR_FS").values() for class_name in classes}


@pytest.mark.parametrize("name", ["CIFAR_FS", "FC100"])
@pytest.mark.parametrize("folder", ["metaoptnet_pickles_small", "metaoptnet_pickles_small_py2"])
def test_the_real_pickles_of_both_pythons_become_class_folders(
    shared: Path, tmp_path: Path, folder: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in SPLITS:
        (tmp_path / f"{name}_{split}.pickle").symlink_to(shared / "data" / folder / f"{name}_{split}.pickle")
    made = prepare(name, tmp_path)
    assert f"a sample of {name}" in capsys.readouterr().out
    images = images_in(made)
    for split in SPLITS:
        with (tmp_path / f"{name}_{split}.pickle").open("rb") as file:
            content = pickle.load(file, encoding="latin1")
        for index, (pixel, label) in enumerate(zip(content["data"], content["labels"], strict=True)):
            np.testing.assert_array_equal(images.pop(f"{split}/class_{label:03d}/{index:06d}.png"), pixel)
    assert images == {}


def official_archive(path: Path, zipped: zipfile.ZipFile, python2: bool = True) -> None:
    """cifar-100-python.tar.gz with the images of a zip in Bertinetto's layout: five of six to `train`."""
    classes = sorted(of_class(zipped))
    parts: dict[str, list[tuple[bytes, int, str]]] = {"train": [], "test": []}
    for label, class_name in enumerate(classes):
        for index, member in enumerate(of_class(zipped)[class_name]):
            image = np.asarray(Image.open(io.BytesIO(zipped.read(member))).convert("RGB"))
            row = image.transpose(2, 0, 1).tobytes(), label, member.rpartition("/")[2]
            parts["test" if index % 6 == 5 else "train"].append(row)
    files = {"cifar-100-python/file.txt~": b""}
    for part, rows in parts.items():
        data = np.frombuffer(b"".join(pixel for pixel, _, _ in rows), np.uint8).reshape(-1, 3072)
        keys = {
            "filenames": [file for _, _, file in rows],
            "fine_labels": [label for _, label, _ in rows],
            "data": data,
        }
        files[f"cifar-100-python/{part}"] = as_python_2(keys) if python2 else pickle.dumps(keys)
    files["cifar-100-python/meta"] = as_python_2({"fine_label_names": classes})
    pack(path / "cifar-100-python.tar.gz", files)


def as_python_2(content: dict[str, Any]) -> bytes:
    """What Python 2 would write with protocol 2: strings, and arrays' pixels, as its 8-bit strings."""

    def write(value: Any) -> bytes:
        if isinstance(value, str):
            return b"U" + bytes([len(value)]) + value.encode()
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        shape = b"(" + b"".join(map(write, value.shape)) + b"t"
        head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01" + shape
        head += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        return head + b"\x89T" + struct.pack("<i", value.size) + value.tobytes() + b"tb"

    return b"\x80\x02}(" + b"".join(write(key) + write(value) for key, value in content.items()) + b"u."


@pytest.mark.parametrize("name", ["CIFAR_FS", "FC100"])
@pytest.mark.parametrize("python2", [True, False])
def test_the_official_archive_gives_the_same_files_as_the_zip(
    small_zip: zipfile.ZipFile, tmp_path: Path, name: str, python2: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = images_in(prepare(name, tmp_path))
    (tmp_path / name).rename(tmp_path / "from_zip")
    official_archive(tmp_path, small_zip, python2)
    (tmp_path / "cifar100.zip").unlink()
    found = images_in(prepare(name, tmp_path))
    assert "cifar-100-python.tar.gz is not the published file (md5 " in capsys.readouterr().out
    assert found.keys() == expected.keys()
    for path, image in found.items():
        np.testing.assert_array_equal(image, expected[path])


def test_an_official_archive_of_another_layout_is_named(tmp_path: Path) -> None:
    files = {
        f"cifar-100-python/{part}": pickle.dumps({"data": 1, "fine_label_names": []}) for part in ("meta", "train")
    }
    path = pack(tmp_path / "cifar-100-python.tar.gz", files)
    with pytest.raises(UserError, match="lacks cifar-100-python/test"):
        prepare("FC100", tmp_path)
    pack(path, files | {"cifar-100-python/test": pickle.dumps([])})
    with pytest.raises(UserError, match="not laid out as CIFAR-100 is"):
        prepare("FC100", tmp_path)
    pack(path, files | {"cifar-100-python/test": pickle.dumps(Path("/"))})
    with pytest.raises(UserError, match=r"cifar-100-python/test in .*tar\.gz holds pathlib"):
        prepare("FC100", tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("no_coverage")
def test_the_full_real_archive_has_100_classes_of_600_images_one_of_them_called_train(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cifar100.zip").symlink_to(shared / "data" / "cifar100.zip")
    found = counts(prepare("CIFAR_FS", tmp_path))
    assert [len(found[split]) for split in SPLITS] == [64, 16, 20]
    assert {images for of_split in found.values() for images in of_split.values()} == {600}
    assert sum("train" in of_split for of_split in found.values()) == 1
    assert "sample" not in capsys.readouterr().out


def test_fc100_has_the_classes_of_cifar_fs_in_other_splits() -> None:
    ours, theirs = read_split("FC100"), read_split("CIFAR_FS")
    assert [len(ours[split]) for split in SPLITS] == [60, 20, 20]
    assert sorted(itertools.chain(*ours.values())) == sorted(itertools.chain(*theirs.values()))


def test_a_zip_that_lost_a_class_or_an_image_is_refused_with_the_difference(tmp_path: Path) -> None:
    names = [class_name for classes in read_split("CIFAR_FS").values() for class_name in classes]
    same = png(0)
    files = {f"cifar100/data/{name}/{i}.png": same for name in names for i in range(7)}
    del files["cifar100/data/train/3.png"]
    pack(tmp_path / "cifar100.zip", files)
    for data_set in cifar100.DATA_SETS:
        name = data_set.name
        assert data_set.published
        contents = write_images(tmp_path / f"as {name}", data_set.sources[0].pictures(tmp_path), name)
        with pytest.raises(UserError, match=r"published: train/train has 6 images, 1 fewer than 7\. "):
            check(name, contents, data_set.published._replace(images=7))
    with pytest.raises(UserError, match=r"has 7 images, 593 fewer than 600; .*; and 95 more"):
        prepare("CIFAR_FS", tmp_path)
    pack(tmp_path / "cifar100.zip", {name: content for name, content in files.items() if "/apple/" not in name})
    with pytest.raises(UserError, match="train has 63 classes, 1 fewer than 64"):
        prepare("CIFAR_FS", tmp_path)
    assert left_in(tmp_path) == ["as CIFAR_FS", "as FC100"]


# ---------------------------------------------------------------- Omniglot


def test_a_repacked_omniglot_is_understood_and_no_drawing_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(omniglot, "ARCHIVES", {"images_background": 2, "images_evaluation": 1})
    monkeypatch.setattr(omniglot, "SPLIT_SIZES", {"train": 1, "val": 1, "test": 1})
    drawing = encoded(np.zeros((105, 105), np.uint8))
    for archive, characters in omniglot.ARCHIVES.items():
        names = [
            f"./python/{archive}/{archive}/character0{k}/{i:04d}.png" for k in range(characters) for i in range(20)
        ]
        pack(tmp_path / f"{archive}.zip", dict.fromkeys(names, drawing))
    made = write_images(tmp_path / "made", omniglot.pictures(tmp_path), "omniglot")
    assert counts_of(made) == {"train": 20, "val": 20, "test": 20}
    assert len(images_in(tmp_path / "made")) == 60
    monkeypatch.setattr(omniglot, "MAX_BYTES", len(drawing) - 1)
    with pytest.raises(UserError, match="more than it can need"):
        write_images(tmp_path / "again", omniglot.pictures(tmp_path), "omniglot")


def counts_of(contents: Contents) -> dict[str, int]:
    return {split: sum(classes.values()) for split, classes in contents.items()}


def test_an_archive_of_class_folders_called_omniglot_is_counted_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(tmp_path / "omniglot.zip", class_folders())
    prepare("omniglot", tmp_path)
    assert (
        "a sample of omniglot, not the published data set: train has 3 classes, 1147 fewer" in capsys.readouterr().out
    )


# ---------------------------------------------------------------- miniImageNet and tieredImageNet


def arrays(split: str) -> tuple[np.ndarray, list[int]]:
    """(N, 8, 8, 3) and labels, of 4 images of each class of the split, mixed."""
    labels = [label for _ in range(4) for label in LABELS[split]]
    return np.stack([pixels(10 * label + i) for i, label in enumerate(labels)]), labels


def expect(made: Path, name_of: Callable[[str, int], str]) -> None:
    """`made` holds the images of `arrays`, each in the class that name_of(split, label) says."""
    images = images_in(made)
    for split in SPLITS:
        for index, (image, label) in enumerate(zip(*arrays(split), strict=True)):
            np.testing.assert_array_equal(images.pop(f"{split}/{name_of(split, label)}/{index:06d}.png"), image)
    assert images == {}


def dump(path: Path, content: object, protocol: int = 4) -> None:
    path.write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("protocol", [2, 5])
def test_mini_imagenet_from_metaoptnets_pickles(tmp_path: Path, protocol: int) -> None:
    for split, stem in zip(SPLITS, ("train_phase_train", "val", "test"), strict=True):
        images, labels = arrays(split)
        content: dict[str, object] = {"data": images, "labels": labels}
        if protocol == 5:
            content["catname2label"] = {f"n{label:08d}": label for label in LABELS[split]}
        dump(tmp_path / f"miniImageNet_category_split_{stem}.pickle", content, protocol)
    dump(tmp_path / "miniImageNet_category_split_train_phase_val.pickle", None)  # theirs too, but not needed
    name = "n{:08d}" if protocol == 5 else "class_{:03d}"
    expect(prepare("mini_imagenet", tmp_path), lambda split, label: name.format(label))


@pytest.mark.parametrize("as_array", [True, False])
def test_mini_imagenet_from_the_cache_pickles(tmp_path: Path, as_array: bool) -> None:
    for split in SPLITS:
        images, labels = arrays(split)
        class_dict: dict[str, Any] = {
            f"n{label:08d}": [i for i, of_image in enumerate(labels) if of_image == label] for label in LABELS[split]
        }
        if as_array:  # and names as bytes, which Python 3 makes of Python 2's
            class_dict = {name.encode(): np.array(indices) for name, indices in class_dict.items()}  # type: ignore[misc]
        dump(tmp_path / f"mini-imagenet-cache-{split}.pkl", {"image_data": images, "class_dict": class_dict})
    expect(prepare("mini_imagenet", tmp_path), lambda split, label: f"n{label:08d}")
    dump(
        tmp_path / "mini-imagenet-cache-val.pkl",
        {"image_data": arrays("val")[0], "class_dict": {"n00000001": [0, 1, 1]}},
    )
    (tmp_path / "mini_imagenet").rename(tmp_path / "before")
    with pytest.raises(UserError, match="does not name each of the 8 images once"):
        prepare("mini_imagenet", tmp_path)


@pytest.mark.parametrize(
    ("name", "archive"),
    [("mini_imagenet", "mini_imagenet_full_size.tar.bz2"), ("tiered_imagenet", "tiered_imagenet.tar"),
     ("mini_imagenet", "mini_imagenet.zip")],
)  # fmt: skip
def test_imagenets_from_tars_of_class_folders(tmp_path: Path, name: str, archive: str) -> None:
    files = class_folders(f"{archive.split('.')[0]}/")
    pack(tmp_path / archive, files)
    found = files_in(prepare(name, tmp_path))
    del found[staging.CONTENTS_FILE]
    assert found == {member.split("/", 1)[1]: content for member, content in files.items()}


@pytest.mark.parametrize("where", ["ImageNet", "ImageNet/train"])
def test_imagenets_own_folders_are_linked_not_copied(tmp_path: Path, where: str) -> None:
    classes = [class_name for of_split in read_split("mini_imagenet").values() for class_name in of_split]
    for class_name in [*classes, "n99999999"]:
        (tmp_path / where / class_name).mkdir(parents=True)
        for i in (2, 0, 1):
            (tmp_path / where / class_name / f"{class_name}_{i}.JPEG").write_bytes(png(i))
    source = imagenet.MINI_IMAGENET.sources[-1]
    assert source.needs == ("ImageNet",)
    first = partial(imagenet.linked, "mini_imagenet", 2)
    assert [picture.file for picture in first(tmp_path)][:4] == [
        "n01532829_0.JPEG", "n01532829_1.JPEG", "n01558993_0.JPEG", "n01558993_1.JPEG",
    ]  # fmt: skip
    contents = write_images(tmp_path / "made", source.pictures(tmp_path), "mini_imagenet")
    assert {split: len(names) for split, names in contents.items()} == {"train": 64, "val": 16, "test": 20}
    link = tmp_path / "made" / "val" / "n01855672" / "n01855672_1.JPEG"
    assert link.is_symlink() and link.read_bytes() == png(1)
    with pytest.raises(UserError, match="has 3 images, 597 fewer than 600"):
        prepare("mini_imagenet", tmp_path)


@pytest.mark.parametrize("suffix", [".JPEG", ".jpeg", ".jpg", ".JPG"])
def test_a_sample_of_imagenets_folders_is_taken_and_what_it_lacks_is_said(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ImageNet").mkdir()
    with pytest.raises(UserError, match=r"has no n01532829/\*\.JPEG; it lacks 100 of the 100 classes of mini_imagenet"):
        prepare("mini_imagenet", tmp_path)
    for names in read_split("mini_imagenet").values():
        (tmp_path / "ImageNet" / names[1]).mkdir(parents=True)
        (tmp_path / "ImageNet" / names[1] / f"0{suffix}").write_bytes(png(0))
        (tmp_path / "ImageNet" / names[1] / "._0.JPEG").write_bytes(b"")
    assert [sum(classes.values()) for classes in counts(prepare("mini_imagenet", tmp_path)).values()] == [1, 1, 1]
    said = capsys.readouterr().out
    assert "n01532829/*.JPEG; it lacks 97 of the 100 classes" in said and "a sample of mini_imagenet" in said


def tiered_labels(folder: Path, kind: str) -> Callable[[str, int], str]:
    """Write the labels' pickles; returns the class name of each."""
    words = {split: [f"word / of {label}" for label in range(7)] for split in SPLITS}
    for split in SPLITS:
        labels = arrays(split)[1]
        places = sorted(LABELS[split])
        content: dict[str, object] = {"labels": labels}
        if kind != "labels":
            content = {
                "label_specific": np.array([places.index(label) for label in labels]),
                "label_general": np.array(labels),
            }
        if kind == "words":
            content["label_specific_str"] = [words[split][label] for label in places]
        if kind == "ids":
            content["label_specific_str"] = np.array([f"n{label:08d}" for label in places])
        dump(folder / f"{split}_labels.pkl", content, 2)
    return {
        "labels": lambda split, label: f"class_{label:03d}",
        "places": lambda split, label: f"{split}_{LABELS[split].index(label):03d}",
        "words": lambda split, label: f"{split}_{LABELS[split].index(label):03d}_word_of_{label}",
        "ids": lambda split, label: f"n{label:08d}",
    }[kind]


@pytest.mark.parametrize("kind", ["labels", "places", "words", "ids"])
def test_tiered_imagenet_from_npz(tmp_path: Path, kind: str) -> None:
    for split in SPLITS:
        save: Any = np.savez_compressed if split == "val" else np.savez
        save(tmp_path / f"{split}_images.npz", images=arrays(split)[0])
    name_of = tiered_labels(tmp_path, kind)
    expect(prepare("tiered_imagenet", tmp_path), name_of)


@pytest.mark.parametrize("form", ["column", "row", "bytes", "text"])
def test_tiered_imagenet_from_pickled_pngs(tmp_path: Path, form: str) -> None:
    as_form: Callable[[bytes], Any] = {
        "column": lambda data: np.frombuffer(data, np.uint8)[:, None],
        "row": lambda data: np.frombuffer(data, np.uint8),
        "bytes": lambda data: data, "text": lambda data: data.decode("latin1"),
    }[form]  # fmt: skip
    for split in SPLITS:
        dump(tmp_path / f"{split}_images_png.pkl", [as_form(encoded(image)) for image in arrays(split)[0]], 2)
    name_of = tiered_labels(tmp_path, "labels")
    expect(prepare("tiered_imagenet", tmp_path), name_of)


def test_pickled_pngs_that_are_too_few_or_no_list_are_named(tmp_path: Path) -> None:
    for split in SPLITS:
        dump(tmp_path / f"{split}_images_png.pkl", [encoded(image) for image in arrays(split)[0]][1:])
    tiered_labels(tmp_path, "labels")
    with pytest.raises(UserError, match=r"train_images_png\.pkl has 11 images, but there are 12 labels"):
        prepare("tiered_imagenet", tmp_path)
    for odd, message in (
        (10**11, "a int in the place of an image"), (None, "NoneType"), ("é\u4444", "a str"), ([1, 2], "a list"),
        ({}, "a dict"), (np.zeros((4, 4, 3)), "type float64"), (np.zeros((4, 4, 7), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"), (np.zeros(4), "a ndarray"),
    ):  # fmt: skip
        dump(tmp_path / "train_images_png.pkl", [png(0)] * 11 + [odd])
        with pytest.raises(UserError, match=rf"train_images_png\.pkl holds .*{message}"):
            prepare("tiered_imagenet", tmp_path)
    dump(tmp_path / "train_images_png.pkl", arrays("train")[0])
    with pytest.raises(UserError, match=r"train_images_png\.pkl holds a ndarray, not a list of PNG files"):
        prepare("tiered_imagenet", tmp_path)


@pytest.mark.parametrize("words", [5, {"a": 1}, [7], [["a"]], np.array([["a"]]), np.array("a")])
def test_class_words_of_another_kind_are_named(tmp_path: Path, words: Any) -> None:
    for split in SPLITS:
        dump(tmp_path / f"{split}_images_png.pkl", [png(0)])
        dump(tmp_path / f"{split}_labels.pkl", {"label_specific": [0], "label_specific_str": words})
    with pytest.raises(UserError, match=r"train_labels\.pkl holds a \w+ (of class names|as a class name)"):
        prepare("tiered_imagenet", tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_of_pixels_or_pngs_is_read_with_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_files, "RELEASE_EVERY", 10)
    images = np.full((100, 512, 512, 3), 7, np.uint8)  # 79 MB
    dump(tmp_path / "labels", {"labels": [0] * 100})
    dump(tmp_path / "pixels", {"data": images, "labels": [0] * 100})
    dump(tmp_path / "bytes", [image.tobytes() for image in images])
    dump(tmp_path / "rows", [image.reshape(-1) for image in images])
    before = mapped()
    readers: list[tuple[array_files.Reader, list[str]]] = [
        (array_files.data_and_labels, ["pixels"]),
        (array_files.pngs_and_labels, ["bytes", "labels"]), (array_files.pngs_and_labels, ["rows", "labels"]),
    ]  # fmt: skip
    for read, files in readers:
        pictures = array_files.pictures(read, "train", *(tmp_path / file for file in files))
        most = max(mapped() for picture in pictures if np.max(np.frombuffer(picture.content, np.uint8)) == 7)  # type: ignore
        assert most - before < 30_000


def nested(times: int) -> list[Any]:
    held: list[Any] = [1, 1]
    for _ in range(times):
        held = [held] * 2
    return held


@pytest.mark.parametrize(
    "labels", [nested(60), [1, [2]], [1, True], [1, 2.0], [1, 2**31], [1, -1], np.ones((2, 2), int), np.ones(2), "1"],
    ids=["nested", "ragged", "truth", "float", "high", "negative", "square", "floats", "text"],
)  # fmt: skip
def test_labels_that_are_no_list_of_whole_numbers_are_named_at_once(tmp_path: Path, labels: Any) -> None:
    for split in SPLITS:
        content = {"data": np.zeros((2, 8, 8, 3), np.uint8), "labels": labels}
        dump(tmp_path / f"CIFAR_FS_{split}.pickle", content)
        dump(tmp_path / f"FC100_{split}.pickle", content | {"labels": [1, 2], "catname2label": {"a": labels}})
    for name in ("CIFAR_FS", "FC100"):
        with pytest.raises(UserError, match=r"_train\.pickle holds something else than a list of whole numbers"):
            prepare(name, tmp_path)


@pytest.mark.parametrize("name", [2**20000, 1.5, 7], ids=["huge", "float", "int"])
def test_class_names_that_are_no_text_are_named(tmp_path: Path, name: Any) -> None:
    for split in SPLITS:
        content = {"image_data": np.zeros((1, 8, 8, 3), np.uint8), "class_dict": {name: [0]}}
        dump(tmp_path / f"mini-imagenet-cache-{split}.pkl", content)
        dump(tmp_path / f"FC100_{split}.pickle", {name: 1})
    with pytest.raises(UserError, match=r"train\.pkl holds a (int|float) as a class name"):
        prepare("mini_imagenet", tmp_path)
    with pytest.raises(UserError, match="has no 'data': it holds a dict of"):
        prepare("FC100", tmp_path)


def test_a_large_npz_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocess.array_files.CHUNK", 5 * 8 * 8 * 3)
    test_tiered_imagenet_from_npz(tmp_path, "labels")


def spoil_npz(path: Path, content: Any) -> None:
    np.savez(path, **(content if isinstance(content, dict) else {"images": content}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((8, 8, 8, 3), "f4"), r"val_images\.npz holds an array of shape \(8, 8, 8, 3\) and type float32"),
        (np.zeros((8, 192), np.uint8), "an array of shape"), (np.zeros((8, 8, 8, 4), np.uint8), "an array of shape"),
        (np.array([{}] * 8, dtype=object), "type object"),
        (np.asfortranarray(np.zeros((8, 8, 8, 3), np.uint8)), "order"),
        (np.zeros((8, 1, 1025, 3), np.uint8), "shape"), (np.zeros((8, 1025, 1, 3), np.uint8), "shape"),
        ({"pictures": np.zeros(8)}, r"has no array 'images': it holds 'pictures\.npy'"),
        (np.zeros((7, 8, 8, 3), np.uint8), "has 7 images, but there are 8 labels"),
    ],
    ids=["floats", "flat", "four channels", "objects", "fortran", "wide", "high", "other key", "one fewer"],
)  # fmt: skip
def test_an_npz_that_is_not_images_says_what_it_is(tmp_path: Path, content: Any, message: str) -> None:
    for split in SPLITS:
        np.savez(tmp_path / f"{split}_images.npz", images=arrays(split)[0])
    tiered_labels(tmp_path, "labels")
    spoil_npz(tmp_path / "val_images.npz", content)
    with pytest.raises(UserError, match=message):
        prepare("tiered_imagenet", tmp_path)
    assert left_in(tmp_path) == []


def test_an_npz_of_another_format_version_is_named(tmp_path: Path) -> None:
    for split in SPLITS:
        with zipfile.ZipFile(tmp_path / f"{split}_images.npz", "w") as archive, archive.open("images.npy", "w") as out:
            np.lib.format.write_array(out, arrays(split)[0], version=(2, 0))
    tiered_labels(tmp_path, "labels")
    with pytest.raises(UserError, match=r"train_images\.npz is damaged .*\(an array of format \(2, 0\)\)"):
        prepare("tiered_imagenet", tmp_path)


def test_an_npz_whose_header_claims_more_than_it_holds_is_an_error(tmp_path: Path) -> None:
    for split in SPLITS:
        np.savez(tmp_path / f"{split}_images.npz", images=arrays(split)[0])
    tiered_labels(tmp_path, "labels")
    with zipfile.ZipFile(tmp_path / "val_images.npz", "w") as archive, archive.open("images.npy", "w") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": (8, 900, 900, 3)})
    with pytest.raises(UserError, match=r"val_images\.npz is damaged .*'images' has fewer than the 8 images"):
        prepare("tiered_imagenet", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "has no 'data': it holds list"), ({"labels": []}, "has no 'data': it holds a dict of 'labels'"),
        ({"data": np.zeros((4, 8, 8, 3)), "labels": [1] * 4}, r"shape \(4, 8, 8, 3\) and type float64"),
        ({"data": [1], "labels": [1]}, "holds list"),
        ({"data": np.zeros((2, 0, 8, 3), np.uint8), "labels": [1, 1]}, "shape"),
        ({"data": np.zeros((4, 8, 8, 3), np.uint8), "labels": [1] * 5}, "4 images, but there are 5 labels"),
        ({"data": np.zeros((1, 8, 8, 3), np.uint8), "labels": ["a"]}, "whole numbers"),
        ({"data": np.zeros((1, 8, 8, 3), np.uint8), "labels": [1]}, "'class_001' of FC100 is in train and in val"),
    ],
)  # fmt: skip
def test_a_pickle_of_other_contents_says_what_they_are(tmp_path: Path, content: Any, message: str) -> None:
    for split in SPLITS:
        dump(tmp_path / f"FC100_{split}.pickle", content)
    with pytest.raises(UserError, match=message):
        prepare("FC100", tmp_path)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", ["CIFAR_FS", "FC100", "mini_imagenet", "tiered_imagenet"])
def test_splits_are_those_of_the_papers(shared: Path, name: str) -> None:
    facts = shared / "facts" / f"{name.lower()}_split.json"
    assert read_split(name) == json.loads(facts.read_text())
