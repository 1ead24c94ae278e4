"""CUB from its archive: the CxGrad split, all 11,788 photos, and errors that name the difference."""

import io
import json
import tarfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from preprocess import cub, staging
from preprocess.preprocess import prepare
from preprocess.sources import check, read_split
from preprocess.staging import Contents
from preprocess.writing import write_images
from tests.made_archives import pack
from utils.errors import UserError


def jpeg(colour: str = "green") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "jpeg")
    return file.getvalue()


JPEG = jpeg()
SMALL = {  # three classes of the published archive
    "001.Black_footed_Albatross": ["Black_Footed_Albatross_0001_796111.jpg", "Black_Footed_Albatross_0002_55.jpg"],
    "002.Laysan_Albatross": ["Laysan_Albatross_0001_545.jpg"],
    "004.Groove_billed_Ani": ["Groove_Billed_Ani_0002_1670.jpg"],
}


def write_archive(
    folder: Path, classes: dict[str, list[str]], without: Iterable[str] = (), prefix: str = "", list_first: bool = True
) -> None:
    """A CUB_200_2011.tgz in the published layout, its images.txt complete, some of the photos missing."""
    names = [f"{class_name}/{file}" for class_name, files in classes.items() for file in files]
    missing = set(without)
    listed = "".join(f"{number} {name}\n" for number, name in enumerate(names, 1)).encode()
    images = [(f"CUB_200_2011/images/{name}", JPEG) for name in names if name not in missing]
    texts = [("CUB_200_2011/images.txt", listed), ("CUB_200_2011/README", b"read me"), ("attributes.txt", b"1 x\n")]
    with tarfile.open(folder / cub.ARCHIVE, "w:gz", compresslevel=1) as archive:
        for name, content in [*texts, *images] if list_first else [*images, *texts]:
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_the_split_is_cxgrads_by_class_number(shared: Path) -> None:
    split = read_split("CUB")
    assert split == {
        name: [f"{number:03d}" for number in numbers]
        for name, numbers in json.loads((shared / "facts" / "cub_split.json").read_text()).items()
    }
    assert sorted(number for numbers in split.values() for number in numbers) == [
        f"{number:03d}" for number in range(1, 201)
    ]


@pytest.mark.parametrize(("prefix", "list_first"), [("", True), ("./", False)])
def test_photos_come_to_the_split_of_their_class_unchanged(tmp_path: Path, prefix: str, list_first: bool) -> None:
    write_archive(tmp_path, SMALL, prefix=prefix, list_first=list_first)
    (tmp_path / "CUB").mkdir()
    contents = write_images(tmp_path / "CUB", cub.photos(tmp_path), "CUB")
    assert contents == {
        "train": {"001.Black_footed_Albatross": 2},
        "val": {"002.Laysan_Albatross": 1},
        "test": {"004.Groove_billed_Ani": 1},
    }
    assert contents == staging.count_images(tmp_path / "CUB")
    photo = "train/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg"
    assert (tmp_path / "CUB" / photo).read_bytes() == JPEG
    assert sum(path.is_file() for path in (tmp_path / "CUB").rglob("*")) == 4  # no text among the photos


@pytest.mark.slow
@pytest.mark.usefixtures("no_coverage")
def test_an_archive_of_200_classes_and_11788_photos_is_the_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [59 - (number <= 12) for number in range(1, 201)]
    assert sum(sizes) == cub.IMAGES
    classes = {f"{number:03d}.Bird": [f"{i}.jpg" for i in range(size)] for number, size in enumerate(sizes, start=1)}
    write_archive(tmp_path, classes)
    folder = prepare("cub", tmp_path)
    assert folder == tmp_path / "CUB"
    assert "train 100 classes, 5894 images; val 50 classes, 2947 images; test 50 classes, 2947 images" in (
        capsys.readouterr().out
    )
    (tmp_path / "other").mkdir()
    write_archive(tmp_path / "other", classes, without=[f"200.Bird/{i}.jpg" for i in range(59)])
    with pytest.raises(UserError, match=r"lacks 59 of the 11,788 photos that"):
        deque(cub.photos(tmp_path / "other"), maxlen=0)


def test_missing_photos_are_counted_and_named(tmp_path: Path) -> None:
    write_archive(tmp_path, SMALL, without=["002.Laysan_Albatross/Laysan_Albatross_0001_545.jpg"])
    lost = r"lacks 1 of the 4 photos that its images\.txt lists: '002\.\w+/Laysan_Albatross_0001_545\.jpg'\. Fetch"
    with pytest.raises(UserError, match=lost):
        prepare("CUB", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [cub.ARCHIVE]
    everything = SMALL | {"004.Groove_billed_Ani": [f"{i}.jpg" for i in range(11_785)]}
    write_archive(tmp_path, everything, without=[f"004.Groove_billed_Ani/{i}.jpg" for i in range(11_785)])
    with pytest.raises(UserError, match=r"lacks 11,785 of the 11,788 .*_Ani/2\.jpg'; and 11,782 more\. Fetch"):
        prepare("CUB", tmp_path)


def test_photos_that_are_not_listed_do_not_make_up_for_missing_ones(tmp_path: Path) -> None:
    swapped = SMALL | {"002.Laysan_Albatross": ["other.jpg"]}
    write_archive(tmp_path, swapped | {"006.Least_Auklet": ["a.jpg"]}, without=["002.Laysan_Albatross/other.jpg"])
    with pytest.raises(UserError, match=r"lacks 1 of the 5 photos .*lists: '002\.Laysan_Albatross/other\.jpg'\. Fetch"):
        prepare("CUB", tmp_path)


def test_a_class_outside_the_200_is_an_error_and_hidden_files_are_no_photos(tmp_path: Path) -> None:
    write_archive(tmp_path, SMALL | {"201.Dodo": ["a.jpg"]})
    with pytest.raises(UserError, match=r"class '201\.Dodo', which is none of CUB's 200"):
        prepare("CUB", tmp_path)
    pack(tmp_path / cub.ARCHIVE, {"CUB_200_2011/images/001.Black_footed_Albatross/._1.jpg": b"of macOS"})
    assert write_images(tmp_path / "CUB", cub.photos(tmp_path), "CUB") == {}


def sizes(total: int) -> Contents:
    """Of 200 classes in CUB's split."""
    contents: Contents = {"train": {}, "val": {}, "test": {}}
    for number, split in enumerate([*["train"] * 100, *["val"] * 50, *["test"] * 50]):
        contents[split][f"{number:03d}"] = total // 200 + (number < total % 200)
    return contents


def test_all_photos_are_counted_in_every_form_of_cub(tmp_path: Path) -> None:
    published = cub.PUBLISHED
    check("CUB", sizes(11_788), published)
    for total, difference in ((11_787, "1 fewer"), (11_789, "1 more"), (200, "11588 fewer")):
        with pytest.raises(UserError, match=f"{total} images, {difference} than 11788"):
            check("CUB", sizes(total), published)
    pack(tmp_path / "CUB.zip", {f"{split}/{name}/0.jpg": JPEG for split, names in sizes(200).items() for name in names})
    with pytest.raises(UserError, match="200 images, 11588 fewer than 11788"):
        prepare("CUB", tmp_path)


def test_a_small_cut_of_cub_is_called_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_archive(tmp_path, SMALL)
    prepare("CUB", tmp_path)
    assert "a sample of CUB, not the published data set: train has 1 classes" in capsys.readouterr().out


def test_a_missing_archive_says_what_to_fetch_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"CUB_200_2011\.tgz.*Caltech-UCSD Birds.*data\.caltech\.edu") as error:
        prepare("CUB", tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_unreadable_photo_is_named_and_an_archive_cut_short_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path, SMALL)
    archive = tmp_path / cub.ARCHIVE
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"CUB_200_2011\.tgz is damaged"):
        write_images(tmp_path / "CUB", cub.photos(tmp_path), "CUB")
    monkeypatch.setattr(f"{__name__}.JPEG", JPEG[:300])
    write_archive(tmp_path, SMALL)
    with pytest.raises(UserError, match=r"4 images cannot be read.*001\.Black_footed_Albatross/Black_Footed"):
        write_images(tmp_path / "other", cub.photos(tmp_path), "CUB")
