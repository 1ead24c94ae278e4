"""What the description of a data set says: counts, statistics, duplicates, and its contact sheet."""

import json
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from preprocess import staging
from preprocess.describe import describe, image_sizes, main
from preprocess.survey import count_pairs, identical, near_duplicates, survey
from tests.forked import run_forked
from utils.errors import UserError
from utils.images import list_classes

ROOT = Path(__file__).resolve().parent.parent


def photo(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Smooth random colours, as photos have."""
    coarse = np.random.RandomState(seed).randint(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def reencode(image: Image.Image, quality: int) -> Image.Image:
    jpeg = BytesIO()
    image.save(jpeg, "jpeg", quality=quality)
    return Image.open(jpeg)


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """tmp_path/birds: 2 + 1 + 1 classes of 3 different photos each."""
    for seed in range(12):
        split, class_name = [("train", "crow"), ("train", "owl"), ("val", "jay"), ("test", "gull")][seed // 3]
        save(photo(seed), tmp_path / "birds" / split / class_name / f"{seed}.png")
    return tmp_path / "birds"


def described(folder: Path, **options: Path) -> str:
    return describe(folder.name, folder.parent, options.get("output", folder.parent / "sheet.png"))


def surveyed(folder: Path, workers: int | None = 1) -> dict:
    return {split: survey(list_classes(folder / split), workers) for split in staging.SPLITS}


# ---------------------------------------------------------------- numbers


def test_the_command_prints_the_numbers_and_writes_the_sheet_to_the_current_folder(
    data_set: Path, tmp_path: Path
) -> None:
    save(photo(20, 20, 30), data_set / "val" / "jay" / "other.png")
    (tmp_path / "here").mkdir()
    command = [sys.executable, "preprocess/describe.py", "Birds", "--dataset_dir", str(tmp_path)]
    done = run_forked(command, cwd=tmp_path / "here")
    assert (done.returncode, done.stderr) == (0, "")
    cells = {line.split("  ")[0]: line.split()[-3:] for line in done.stdout.splitlines() if line}
    assert cells["classes"] == ["2", "1", "1"]
    assert cells["images"] == ["6", "4", "3"]
    assert "32x32: 3" in done.stdout and "20x30: 1" in done.stdout
    assert done.stdout.endswith("Contact sheet: birds_contact_sheet.png\n")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["birds_contact_sheet.png"]


def test_mean_and_std_are_those_of_all_pixels_at_their_own_sizes(data_set: Path) -> None:
    save(photo(20, 200, 100), data_set / "val" / "jay" / "large.png")
    files = sorted((data_set / "val").rglob("*.png"))
    pixels = np.concatenate([np.asarray(Image.open(file)).reshape(-1, 3) for file in files]) / 255
    found = survey(list_classes(data_set / "val"))
    mean, std = found.mean_and_std()
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-9)
    assert " ".join(f"{value:.3f}" for value in pixels.mean(axis=0)) in described(data_set)


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    for seed in range(200):  # four pieces
        save(photo(seed), tmp_path / "a" / f"{seed:03d}.png")
    (tmp_path / "a" / "100.png").write_bytes(b"x")
    one, two = (survey(list_classes(tmp_path), workers) for workers in (1, 2))
    assert one.files == two.files and len(one.files) == 199 and one.bad == two.bad
    np.testing.assert_array_equal(one.measured, two.measured)


def test_sizes_are_listed_if_few_and_summed_up_if_many() -> None:
    assert image_sizes(np.array([[32, 32]] * 5)) == ["32x32"]
    assert image_sizes(np.array([[8, 9], [32, 30], [32, 30]])) == ["32x30: 2", "8x9: 1"]
    many = np.array([[10, 50], [20, 40], [30, 30], [500, 20], [600, 10]])
    assert image_sizes(many) == ["min 10x10", "median 30x30", "max 600x50", "5 different"]


def test_a_photo_turned_by_exif_counts_as_it_is_seen(data_set: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    save(photo(30, 40, 20), data_set / "test" / "gull" / "turned.jpg", exif=exif)
    found = survey(list_classes(data_set / "test"), 1)
    assert found.measured["size"][found.files.index("gull/turned.jpg")].tolist() == [20, 40]


def test_grey_and_cmyk_files_are_counted_as_such_and_grey_ones_have_one_mean(tmp_path: Path) -> None:
    save(photo(1).convert("L"), tmp_path / "grey" / "test" / "a" / "0.png")
    save(photo(2).convert("L"), tmp_path / "grey" / "test" / "a" / "1.jpg")
    text = described(tmp_path / "grey")
    assert "PNG L: 1" in text and "JPEG L: 1" in text
    (mean,) = (line.split() for line in text.splitlines() if line.startswith("mean"))
    assert len(mean) == 5  # "mean, R G B" and one number
    save(photo(3).convert("CMYK"), tmp_path / "grey" / "test" / "a" / "2.jpg")
    assert "JPEG CMYK: 1" in described(tmp_path / "grey")


def test_a_class_that_is_in_two_splits_is_named(data_set: Path) -> None:
    assert "several splits" not in described(data_set)
    save(photo(40), data_set / "test" / "owl" / "0.png")
    assert "in several splits: 1\n  owl (train, test)" in described(data_set)


def test_a_set_that_differs_from_the_published_one_of_its_name_is_said_so(data_set: Path) -> None:
    assert "published" not in described(data_set)
    text = described(data_set.rename(data_set.parent / "cifar-fs"))
    assert "a sample of CIFAR_FS, not the published data set: train has 2 classes, 62 fewer than 64" in text


def test_unreadable_images_are_named_and_left_out(data_set: Path) -> None:
    damaged = data_set / "train" / "owl" / "4.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    text = described(data_set)
    assert f"Unreadable images, left out above: 1\n  {damaged}: " in text
    for file in (data_set / "val" / "jay").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"None of the 3 images in .*val can be read: UnidentifiedImageError"):
        described(data_set)


# ---------------------------------------------------------------- duplicates


def test_identical_pixels_are_found_whatever_the_file_and_counted_by_what_they_share(data_set: Path) -> None:
    same = Image.open(data_set / "train" / "crow" / "0.png")
    save(same, data_set / "train" / "crow" / "copy.bmp")
    save(same, data_set / "train" / "owl" / "copy.png", compress_level=0)
    save(same, data_set / "test" / "gull" / "copy.webp", lossless=True)
    groups = identical(surveyed(data_set))
    assert groups == [["train/crow/0.png", "train/crow/copy.bmp", "train/owl/copy.png", "test/gull/copy.webp"]]
    assert count_pairs(groups) == (1, 2, 3)
    text = described(data_set)
    assert "identical pixels: 6 (1 within a class, 2 between classes of a split, 3 between splits)" in text
    assert "train/crow/0.png  =  train/crow/copy.bmp  =  train/owl/copy.png  =  test/gull/copy.webp" in text


def test_one_other_pixel_or_another_shape_is_not_identical(data_set: Path) -> None:
    save(Image.new("RGB", (20, 10), "red"), data_set / "train" / "crow" / "wide.png")
    save(Image.new("RGB", (10, 20), "red"), data_set / "test" / "gull" / "tall.png")
    touched = Image.open(data_set / "train" / "crow" / "0.png")
    touched.putpixel((3, 3), (0, 0, 0))
    save(touched, data_set / "val" / "jay" / "touched.png")
    assert identical(surveyed(data_set)) == []


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG": lambda image: reencode(image, 75),
    "smaller": lambda image: image.resize((24, 24), Image.Resampling.LANCZOS),
    "larger": lambda image: image.resize((84, 84), Image.Resampling.BILINEAR),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "grey": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_in_another_split_is_a_near_duplicate(data_set: Path, change: str) -> None:
    original = Image.fromarray(np.asarray(photo(0)) // 2 + 50)  # so that brightening clips nothing
    save(original, data_set / "train" / "crow" / "0.png")
    save(CHANGES[change](original), data_set / "test" / "gull" / "copy.png")
    found, best = near_duplicates(surveyed(data_set), 5)
    assert found == len(best) == 1
    assert (best[0].one, best[0].other) == ("train/crow/0.png", "test/gull/copy.png")
    assert 0.99 <= best[0].correlation <= 1.00001


def test_identical_images_and_those_of_one_split_or_one_colour_are_no_near_duplicates(data_set: Path) -> None:
    original = Image.open(data_set / "train" / "crow" / "0.png")
    save(original, data_set / "test" / "gull" / "same.png")
    save(reencode(original, 90), data_set / "train" / "owl" / "near.jpg")
    save(Image.new("RGB", (32, 32), "white"), data_set / "train" / "owl" / "white.png")
    save(Image.new("RGB", (32, 32), "black"), data_set / "test" / "gull" / "black.png")
    found, best = near_duplicates(surveyed(data_set), 5)
    assert [(pair.one, pair.other) for pair in best] == [("train/owl/near.jpg", "test/gull/same.png")]
    assert found == 1


def test_of_many_near_duplicates_all_are_counted_and_the_most_alike_shown(
    data_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocess.survey.BLOCK", 2)  # so that there are several blocks
    for seed in range(7):
        save(photo(seed), data_set / "train" / "crow" / f"{seed}.png")
        save(reencode(photo(seed), 95 - 10 * seed), data_set / "test" / "gull" / f"near{seed}.png")
    found, best = near_duplicates(surveyed(data_set), 3)
    assert found >= 7 and len(best) == 3  # photos 3 to 5 are in train/owl too
    assert [pair.correlation for pair in best] == sorted((pair.correlation for pair in best), reverse=True)
    assert all(Path(pair.one).stem == Path(pair.other).stem.removeprefix("near") for pair in best)
    assert {pair.other for pair in best} <= {"test/gull/near0.png", "test/gull/near1.png", "test/gull/near2.png"}
    assert f"between splits: {found} (" in described(data_set) and f"\n  and {found - 5} more" in described(data_set)


def test_the_15_pixel_identical_pairs_across_the_splits_of_cifar_fs_are_found(shared: Path, tmp_path: Path) -> None:
    """Among the first 20 images of each of their classes, and one of the pairs that are nearly so."""
    splits = json.loads((shared / "facts" / "cifar_fs_split.json").read_text())
    split_of = {class_name: split for split, names in splits.items() for class_name in names}
    known = json.loads((shared / "facts" / "cifar100_pixel_duplicates.json").read_text())
    near = "snake/carphophis_amoenus_s_000156.png", "worm/worm_s_000007.png"
    kept = {name for pair in known for name in pair} | {f"cifar100/data/{name}" for name in near}
    images_of = Counter({Path(name).parent: 0 for name in kept})
    with zipfile.ZipFile(shared / "data" / "cifar100.zip") as archive:
        for name in sorted(archive.namelist()):
            path = Path(name)
            if name not in kept and images_of.get(path.parent, 20) >= 20:
                continue
            images_of[path.parent] += 1
            place = tmp_path / "CIFAR_FS" / split_of[path.parent.name] / path.parent.name / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(archive.read(name))
    found = surveyed(tmp_path / "CIFAR_FS")
    groups = identical(found)
    assert {frozenset(path.partition("/")[2] for path in group) for group in groups} == {
        frozenset(name.removeprefix("cifar100/data/") for name in pair) for pair in known
    }
    assert count_pairs(groups) == (9, 2, 15)
    _, best = near_duplicates(found, 5)
    assert (best[0].one, best[0].other) == (f"train/{near[0]}", f"test/{near[1]}")


# ---------------------------------------------------------------- contact sheet


def test_the_contact_sheet_shows_images_of_every_split_enlarged_by_whole_factors(data_set: Path) -> None:
    described(data_set)
    sheet = np.asarray(Image.open(data_set.parent / "sheet.png").convert("RGB"))
    for file in data_set.rglob("*.png"):
        pixels = np.asarray(Image.open(file)).repeat(2, axis=0).repeat(2, axis=1)  # 64x64 in cells of 72x72
        places = np.argwhere((sheet[:-63, :-63] == pixels[0, 0]).all(axis=2))
        assert any((sheet[y : y + 64, x : x + 64] == pixels).all() for y, x in places), file


def test_a_large_image_keeps_its_proportions_and_an_odd_class_name_does_no_harm(data_set: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(data_set / "val") + b"/pi\xf1on"))
    try:
        save(Image.new("RGB", (400, 100), (1, 2, 3)), odd / "wide.png")
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    described(data_set)
    sheet = np.asarray(Image.open(data_set.parent / "sheet.png"))
    rows, columns = np.nonzero((sheet == (1, 2, 3)).all(axis=2))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (18, 72)


# ---------------------------------------------------------------- errors


def test_a_data_set_that_is_not_there_says_how_to_make_it_and_what_is_there(
    data_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["CIFAR_FS", "--dataset_dir", str(data_set.parent)]) == 2
    error = capsys.readouterr().err
    assert "No data set 'CIFAR_FS'" in error and "--datasets CIFAR_FS`" in error and error.endswith("birds\n")
    with pytest.raises(UserError, match=r"Data sets in .*nowhere: none"):
        describe("birds", data_set / "nowhere", Path("sheet.png"))


def test_a_built_in_data_set_that_is_missing_is_made(tmp_path: Path) -> None:
    text = describe("digits", tmp_path, tmp_path / "sheet.png")
    assert "1,797" in text and "174 to 183" in text and (tmp_path / "digits" / "test").is_dir()


def test_a_data_set_that_lost_images_or_has_no_classes_is_an_error(data_set: Path) -> None:
    (data_set / staging.CONTENTS_FILE).write_text(json.dumps({"train": {"crow": 4}}))
    with pytest.raises(UserError, match="train/crow has 3 of 4 images"):
        described(data_set)
    (data_set.parent / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="no images in train/, val/ or test/"):
        described(data_set.parent / "empty")
    (data_set.parent / "empty" / "train").rmdir()
    save(photo(1), data_set.parent / "empty" / "owl" / "0.png")
    with pytest.raises(UserError, match=r"not split, make .*--from_folder .*/empty --split"):
        described(data_set.parent / "empty")
    (data_set / staging.CONTENTS_FILE).unlink()
    (data_set / "val" / "wren").mkdir()
    with pytest.raises(UserError, match=r"class folder .*wren holds no images"):
        described(data_set)


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(data_set: Path) -> None:
    for output in (data_set / "sheet.jpg", data_set / "nowhere" / "sheet.png"):
        with pytest.raises(UserError, match=r"cannot be .*--output a \.png file in a folder that exists"):
            described(data_set, output=output)
    (data_set / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder\.png.*Is a directory.*--output"):
        described(data_set, output=data_set / "folder.png")
