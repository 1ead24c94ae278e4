"""From archive or fonts to a data set folder: whole or not at all, the same on every run, errors that help."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageFont

from preprocess import digits, glyphs, omniglot, staging
from preprocess.contact_sheet import contact_sheet
from preprocess.preprocess import declared, ensure_builtin, main, prepare
from preprocess.writing import write_images
from tests.made_archives import pack, png
from utils.errors import UserError
from utils.images import in_order, list_classes
from utils.names import KNOWN, canonical_name, find_dataset

ROOT = Path(__file__).resolve().parent.parent


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left_in(folder: Path) -> list[str]:
    """Everything in the folder, hidden staging folders too, but for archives."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".zip")


# ---------------------------------------------------------------- one that is there


def test_a_complete_data_set_is_said_so_and_left_alone(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cifar100.zip").symlink_to(shared / "data" / "cifar_fs_small.zip")
    folder = prepare("CIFAR_FS", tmp_path)
    os.utime(folder, (1, 1))
    (tmp_path / "cifar100.zip").unlink()  # nor is it needed any more
    assert prepare("cifar-fs", tmp_path) == folder
    for printed in capsys.readouterr().out.split(f"{folder} is ")[1:]:  # made, then found
        line, note = printed.splitlines()
        assert line.startswith(("ready: train 8 classes", "there already and left alone: train 8 classes"))
        assert line.endswith("(made from cifar100.zip)")
        assert note.startswith("warning: this is a sample of CIFAR_FS, not the published data set: train has 8 classes")
    assert folder.stat().st_mtime == 1 and left_in(tmp_path) == ["CIFAR_FS"]


# ---------------------------------------------------------------- omniglot


@pytest.fixture
def lake(shared: Path, tmp_path: Path) -> dict[str, zipfile.ZipFile]:
    """Lake's two real archives, in place in tmp_path."""
    for archive in omniglot.ARCHIVES:
        source = shared / "data" / "omniglot" / f"{archive}.zip"
        if not source.is_file():
            pytest.skip(f"{source} is not here")
        (tmp_path / source.name).symlink_to(source)
    return {archive: zipfile.ZipFile(tmp_path / f"{archive}.zip") for archive in omniglot.ARCHIVES}


def drawings_of(lake: dict[str, zipfile.ZipFile]) -> dict[str, tuple[str, str]]:
    """For each drawing of both archives, by ALPHABET_CHARACTER/FILE: archive and member."""
    return {
        "_".join(name.split("/")[1:3]) + "/" + name.split("/")[3]: (archive, name)
        for archive, drawings in lake.items()
        for name in drawings.namelist()
    }


def test_omniglot_is_split_as_mamlpp_does_in_size_and_always_alike(lake: dict[str, zipfile.ZipFile]) -> None:
    drawings = Counter(path.split("/")[0] for path in drawings_of(lake))
    split_of = omniglot.draw_split(set(drawings))
    assert Counter(split_of.values()) == {"train": 1150, "val": 50, "test": 423}
    assert split_of.keys() == drawings.keys() and set(drawings.values()) == {20}
    contents = {split: sorted(name for name in split_of if split_of[name] == split) for split in staging.SPLITS}
    assert [classes[:2] for classes in contents.values()] == [
        ["Alphabet_of_the_Magi_character02", "Alphabet_of_the_Magi_character03"],
        ["Alphabet_of_the_Magi_character01", "Alphabet_of_the_Magi_character04"],
        ["Alphabet_of_the_Magi_character08", "Alphabet_of_the_Magi_character12"],
    ]
    alphabets = {split: {name.rpartition("_")[0] for name in classes} for split, classes in contents.items()}
    assert len(alphabets["train"]) == 50 and len(alphabets["test"]) > 40  # characters are mixed, not alphabets


@pytest.mark.slow
@pytest.mark.usefixtures("no_coverage")
def test_the_real_omniglot_archives_become_small_grey_drawings_in_class_folders(
    lake: dict[str, zipfile.ZipFile], tmp_path: Path
) -> None:
    command = [sys.executable, "preprocess/preprocess.py", "--datasets", "Omniglot", "--dataset_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "train 1150 classes, 23000 images; val 50 classes, 1000 images; test 423 classes, 8460 images" in done.stdout
    assert done.stderr == "" and left_in(tmp_path) == ["omniglot"]
    made = {f"{path.parent.name}/{path.name}": path for path in (tmp_path / "omniglot").rglob("*.png")}
    originals = drawings_of(lake)
    assert made.keys() == originals.keys()
    for path in sorted(made)[::500]:
        archive, member = originals[path]
        image, original = Image.open(made[path]), Image.open(BytesIO(lake[archive].read(member)))
        assert (image.size, image.mode) == ((28, 28), "L")
        expected = np.asarray(original.convert("L").resize((28, 28), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(np.asarray(image), expected)
        assert np.median(expected) == 255 and expected.min() < 100  # dark on light


@pytest.mark.parametrize("lost", ["images_background.zip", "images_evaluation.zip"])
def test_a_missing_omniglot_archive_says_what_to_fetch_before_anything_is_written(
    lake: dict[str, zipfile.ZipFile], tmp_path: Path, lost: str
) -> None:
    (tmp_path / lost).unlink()
    fetch = r"Lake et al\. 2015; folder python/.*brendenlake/omniglot"
    with pytest.raises(UserError, match=rf"its archive is missing.*\n.*{tmp_path / lost} is missing\): .*{fetch}"):
        prepare("omniglot", tmp_path)
    assert left_in(tmp_path) == []


def test_an_omniglot_archive_with_other_characters_or_drawings_is_named(
    lake: dict[str, zipfile.ZipFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocess.omniglot.shrink", None)  # before any drawing is decoded
    evaluation = tmp_path / "images_evaluation.zip"
    data = evaluation.read_bytes()
    evaluation.unlink()
    evaluation.write_bytes(data)
    with zipfile.ZipFile(evaluation, "a") as archive:
        name = "images_evaluation/ULOG/character26/1623_{}.png"
        archive.writestr(name.format(21), archive.read(name.format("01")))
    with pytest.raises(UserError, match=r"published: \w+/ULOG_character26 has 21 images, 1 more than 20\. "):
        prepare("omniglot", tmp_path)
    with zipfile.ZipFile(evaluation, "w") as archive:  # as are archives of 5 alphabets that Lake also published
        for i in range(20):
            archive.writestr(f"images_evaluation/ULOG/character26/1623_{i:02d}.png", b"x")
    with pytest.raises(UserError, match=r"images_evaluation\.zip must hold 659 .*but it has 1\. Fetch"):
        prepare("omniglot", tmp_path)
    evaluation.write_bytes((tmp_path / "images_background.zip").read_bytes())
    with pytest.raises(UserError, match=r"images_evaluation\.zip must hold 659 .*but it has 0\. Fetch"):
        prepare("omniglot", tmp_path)
    assert left_in(tmp_path) == []


def test_an_omniglot_archive_cut_short_is_called_damaged(lake: dict[str, zipfile.ZipFile], tmp_path: Path) -> None:
    data = (tmp_path / "images_background.zip").read_bytes()
    (tmp_path / "images_background.zip").unlink()
    (tmp_path / "images_background.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"images_background\.zip is damaged"):
        prepare("omniglot", tmp_path)
    assert left_in(tmp_path) == []


def test_what_is_no_omniglot_drawing_is_named(lake: dict[str, zipfile.ZipFile]) -> None:
    drawing = lake["images_background"].read("images_background/Greek/character01/0394_01.png")
    assert omniglot.shrink(drawing, "alpha").size == (28, 28)
    other = BytesIO()
    Image.new("1", (28, 28)).save(other, "png")
    for content, reason in (
        (b"x", "cannot identify"),
        (drawing[:60], "image"),
        (other.getvalue(), "its size is 28x28"),
    ):
        with pytest.raises(UserError, match=rf"alpha is not a drawing of 105x105 pixels \(.*{reason}"):
            omniglot.shrink(content, "alpha")


def test_two_omniglot_archives_that_share_characters_are_refused() -> None:
    with pytest.raises(UserError, match="share 2 characters"):
        omniglot.draw_split({f"a_character{i:04d}" for i in range(1621)})


# ---------------------------------------------------------------- whole or not at all


def write_one_image(folder: Path) -> staging.Contents:
    (folder / "train" / "a").mkdir(parents=True)
    (folder / "train" / "a" / "0.png").write_bytes(b"x")
    return {"train": {"a": 1}}


@pytest.fixture
def half_built(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the middle of building tmp_path/glyphs."""
    command = [sys.executable, "preprocess/preprocess.py", "--datasets", "glyphs", "--dataset_dir", str(tmp_path)]

    def hear_ctrl_c() -> None:  # a shell's background jobs, and what they start, are deaf to it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=ROOT, preexec_fn=hear_ctrl_c, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob(".glyphs.partial-*/train/*/20.png")):
            assert process.poll() is None
            time.sleep(0.01)
        yield process
        process.kill()


def test_a_killed_build_leaves_no_half_data_set_and_the_next_one_cleans_up(
    half_built: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    half_built.send_signal(signal.SIGKILL)
    half_built.wait()
    (leftover,) = left_in(tmp_path)
    assert leftover.startswith(".glyphs.partial-")
    (tmp_path / ".glyphs.partial-mine").mkdir()  # not ours: the user's
    staging.build(tmp_path / "glyphs", write_one_image)
    assert left_in(tmp_path) == [".glyphs.partial-mine", "glyphs"]


def test_a_build_that_another_process_is_at_is_left_alone(half_built: subprocess.Popen[bytes], tmp_path: Path) -> None:
    staging.build(tmp_path / "glyphs", write_one_image)
    assert half_built.poll() is None
    assert [name.rpartition("-")[2] for name in left_in(tmp_path)] == [str(half_built.pid), "glyphs"]


def test_ctrl_c_removes_the_staging_folder(half_built: subprocess.Popen[bytes], tmp_path: Path) -> None:
    half_built.send_signal(signal.SIGINT)
    _, said = half_built.communicate()
    assert half_built.returncode == 130
    assert said.decode() == "interrupted: no half data set is left; run the same command again\n"
    assert left_in(tmp_path) == []


def test_ctrl_c_takes_effect_between_the_calls_of_a_pool() -> None:
    """Within one it can leave a lock held, and the program then waits for it for ever."""
    finished = []

    class Piece(Future[int]):
        def result(self, timeout: float | None = None) -> int:
            os.kill(os.getpid(), signal.SIGINT)
            finished.append(self)
            return 1

    with pytest.raises(KeyboardInterrupt):
        list(in_order([first := Piece(), Piece()], ahead=1))
    assert finished == [first]


def test_what_a_killed_build_of_the_same_process_id_left_is_cleaned_up(tmp_path: Path) -> None:
    """In a container every build may have the id 1."""
    leftover = tmp_path / f"{staging._staging_prefix(tmp_path / 'glyphs')}{os.getpid()}"
    (leftover / "train" / "old").mkdir(parents=True)
    staging.build(tmp_path / "glyphs", write_one_image)
    assert left_in(tmp_path) == ["glyphs"] and not (tmp_path / "glyphs" / "train" / "old").exists()


def test_of_two_builds_of_one_data_set_the_first_to_end_stays(tmp_path: Path) -> None:
    def overtaken(folder: Path) -> staging.Contents:
        (tmp_path / "glyphs").mkdir()  # what the other process's rename does
        return write_one_image(tmp_path / "glyphs") and write_one_image(folder)

    staging.build(tmp_path / "glyphs", overtaken)
    assert list(files_in(tmp_path / "glyphs")) == ["train/a/0.png"]  # the other's, which has no contents.json
    assert left_in(tmp_path) == ["glyphs"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named_with_its_cure_and_nothing_is_left(tmp_path: Path) -> None:
    def fill(folder: Path) -> staging.Contents:
        contents = write_one_image(folder)
        Path("/dev/full").write_bytes(b"x")
        return contents

    with pytest.raises(UserError, match=r"disk is full\. Free some space .*--dataset_dir"):
        staging.build(tmp_path / "glyphs", fill)
    assert left_in(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot build .*Not a directory"):
        staging.build(tmp_path / "file" / "digits", write_one_image)


def test_a_data_set_that_lost_images_is_named_and_not_touched(tmp_path: Path) -> None:
    staging.build(tmp_path / "digits", write_one_image)
    (tmp_path / "digits" / "train" / "a" / "0.png").unlink()
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=r"not complete: train/a has 0 of 1 images.*move it away"):
        prepare("digits", tmp_path)
    assert files_in(tmp_path) == before


def test_a_folder_of_the_users_own_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "CIFAR-FS").mkdir()
    write_one_image(tmp_path / "CIFAR-FS")
    assert prepare("CIFAR_FS", tmp_path) == tmp_path / "CIFAR-FS"
    said = capsys.readouterr().out
    assert "train 1 classes, 1 images; no val; no test (not built by this program" in said
    assert "warning: this is CIFAR_FS, but not the published data set: train has 1 classes, 63 fewer" in said
    (tmp_path / "glyphs" / "train" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="no images in train/, val/ or test/"):
        prepare("glyphs", tmp_path)
    assert left_in(tmp_path) == ["CIFAR-FS", "glyphs"]


def test_class_folders_that_are_not_split_say_how_to_split_them_and_never_to_delete_them(tmp_path: Path) -> None:
    for name in ("rose", "lily"):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        (tmp_path / "flowers" / name / "0.png").write_bytes(png(0))
    with pytest.raises(UserError, match=r"--datasets NAME --from_folder .*flowers --split 0\.64 0\.16 0\.2") as error:
        prepare("flowers", tmp_path)
    assert "delete" not in str(error.value) and "complete" not in str(error.value)


def test_a_split_under_another_name_is_not_lost_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_one_image(tmp_path / "mine")
    (tmp_path / "mine" / "valid").mkdir()
    prepare("mine", tmp_path)
    assert "1 images; no val; no test; valid/ is not read, rename it to val/ (not built" in capsys.readouterr().out
    (tmp_path / "mine" / "train").rename(tmp_path / "mine" / "Train")
    with pytest.raises(
        UserError, match=r"has no images in train/, .*; Train/ is not read, rename it to train/; valid/"
    ):
        prepare("mine", tmp_path)


def test_a_link_to_nothing_in_its_place_is_named_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "digits").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"digits is a link to .*gone, which is not there"):
        prepare("digits", tmp_path)
    assert left_in(tmp_path) == ["digits"]


def test_a_record_from_before_it_said_what_the_set_is_made_from_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = write_one_image(tmp_path / "mine")
    (tmp_path / "mine" / staging.CONTENTS_FILE).write_text(json.dumps(contents, indent=1))
    prepare("mine", tmp_path)
    assert capsys.readouterr().out.endswith("left alone: train 1 classes, 1 images; no val; no test\n")


@pytest.mark.parametrize("record", ["[]", '{"train": 3}', "{bad", '{"train": {"a": "many"}}', "\udcff", "3"])
def test_a_damaged_record_is_named(tmp_path: Path, record: str) -> None:
    write_one_image(tmp_path / "mine")
    (tmp_path / "mine" / staging.CONTENTS_FILE).write_text(record, errors="surrogateescape")
    with pytest.raises(UserError, match=r"contents\.json is damaged \(.*move that one file away"):
        prepare("mine", tmp_path)


# ---------------------------------------------------------------- images that are not taken


def prepared_with(tmp_path: Path, bad: bytes, class_name: str = "a") -> str:
    """The error of a data set with this image among others."""
    files = {f"x/{split}/{split}/0.png": png(k) for k, split in enumerate(staging.SPLITS)}
    pack(tmp_path / "x.zip", files | {f"x/train/{class_name}/1.png": bad})
    with pytest.raises(UserError) as error:
        prepare("x", tmp_path)
    assert left_in(tmp_path) == []
    return str(error.value)


def saved(image: Image.Image, kind: str) -> bytes:
    out = BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_postscript_called_png_is_refused_and_no_other_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\necho 10.0\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    (tmp_path / "sets").mkdir()
    said = prepared_with(tmp_path / "sets", saved(Image.new("RGB", (9, 9)), "EPS"))
    assert "1 image cannot be read: train/a/1.png (not an image, or none of PNG, JPEG" in said
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("image", "kind", "reason"),
    [
        (Image.new("F", (8, 8)), "TIFF", "pixels are floating-point"),
        (Image.new("1", (9_500, 9_500)), "PNG", "9500x9500 pixels, more than the 89,478,485 that are read"),
    ],
    ids=["float", "large"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_the_cache_would_refuse_is_refused_at_once(
    tmp_path: Path, image: Image.Image, kind: str, reason: str
) -> None:
    assert f"train/a/1.png (ValueError: {reason}" in prepared_with(tmp_path, saved(image, kind))


@pytest.mark.parametrize("class_name", ["a\nb", "\x1b[31mred", "\x9b31m"])
def test_a_name_that_a_terminal_would_obey_is_refused_and_shown_harmless(tmp_path: Path, class_name: str) -> None:
    said = prepared_with(tmp_path, png(9), class_name)
    assert f"{class_name!r} cannot be the name of a class" in said and class_name not in said


# ---------------------------------------------------------------- names


def test_all_data_sets_that_cannot_be_made_are_named_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    names = ["digits", "FC100", "CUB", "no such thing"]
    assert main(["--datasets", *names, "--dataset_dir", str(tmp_path / "there")]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in ("FC100 cannot be made", "CUB cannot be made", "no recipe for data set"))
    assert left_in(tmp_path / "there") == []


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b"])
def test_what_is_no_name_of_a_folder_is_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_one_image(tmp_path / "x")
    (tmp_path / "sets").mkdir()
    assert main(["--datasets", name, "--dataset_dir", str(tmp_path / "sets")]) == 2
    assert f"--datasets {name!r} cannot be the name of a folder in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "archive"), [("CIFAR_FS", "cifar100.zip"), ("CUB", "CUB_200_2011.tgz"), ("birds", "birds.tar.gz")]
)
def test_a_folder_or_a_link_to_nothing_in_the_place_of_an_archive_is_named(
    tmp_path: Path, name: str, archive: str
) -> None:
    (tmp_path / archive).mkdir()
    with pytest.raises(UserError, match=rf"{archive} is a folder, not an archive\. Put the archive there as it is"):
        prepare(name, tmp_path)
    (tmp_path / archive).rmdir()
    (tmp_path / archive).symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"{archive} is a link to nowhere, which is not there"):
        prepare(name, tmp_path)


def test_an_unknown_name_names_the_nearest_and_nothing_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--datasets", "digits", "CIFAR_FX", "--dataset_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "did you mean CIFAR_FS?" in error and "glyphs_colour" in error and "Traceback" not in error
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", KNOWN)
def test_each_known_data_set_is_declared_under_its_name(name: str) -> None:
    data_set = declared(name)
    assert (
        data_set.name == name
        and data_set.sources
        and data_set.is_built_in == (name in ("glyphs", "glyphs_colour", "digits"))
    )
    for module in {known.module for known in KNOWN.values()}:
        assert all(other.name in KNOWN for other in importlib.import_module(f"preprocess.{module}").DATA_SETS)


def test_mamlpps_names_of_data_sets_find_ours_but_a_folder_of_that_name_comes_first(tmp_path: Path) -> None:
    assert canonical_name("omniglot_dataset") == "omniglot"
    assert canonical_name("mini_imagenet_full_size") == "mini_imagenet"
    (tmp_path / "Omniglot").mkdir()
    assert find_dataset(tmp_path, "omniglot_dataset") == tmp_path / "Omniglot"
    (tmp_path / "omniglot_dataset").mkdir()
    assert find_dataset(tmp_path, "omniglot_dataset") == tmp_path / "omniglot_dataset"
    assert find_dataset(tmp_path, "omniglot") == tmp_path / "Omniglot"  # theirs is not in splits


def test_ensure_builtin_makes_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    for name in ("CIFAR_FS", "mini_imagenet", "no such thing"):
        ensure_builtin(name, tmp_path)
    assert left_in(tmp_path) == []
    ensure_builtin("Digits", tmp_path)
    os.utime(tmp_path / "digits", (1, 1))
    ensure_builtin("digits", tmp_path)
    assert (tmp_path / "digits").stat().st_mtime == 1


# ---------------------------------------------------------------- digits


def test_digits_are_dark_on_light_rgb_pictures_of_a_test_split(tmp_path: Path) -> None:
    contents = write_images(tmp_path, digits.digits(tmp_path), "digits")
    assert contents == staging.count_images(tmp_path)
    assert list(contents["test"].values()) == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    zero = Image.open(tmp_path / "test" / "0" / "000.png")
    assert (zero.size, zero.mode) == ((32, 32), "RGB")
    pixels = np.asarray(zero)
    assert pixels[0, 0].min() > 240 and pixels.min() < 30


# ---------------------------------------------------------------- glyphs

ALL_CHARACTERS = "".join(glyphs.CHARACTERS.values())
FEW = "AЖႵ"


@pytest.fixture(scope="module")
def faces() -> dict[str, list[ImageFont.FreeTypeFont]]:
    return glyphs.faces_of(ALL_CHARACTERS)  # raises where fewer than 8 faces have one of them


def test_no_character_is_in_two_classes_and_each_split_has_its_scripts() -> None:
    scripts = {
        "train": {"LATIN", "GREEK"},
        "val": {"CYRILLIC", "GREEK"},
        "test": {"ARMENIAN", "GEORGIAN"},
    }
    assert len(set(ALL_CHARACTERS)) == len(ALL_CHARACTERS) == 291 + 80 + 131
    assert {unicodedata.category(character) for character in glyphs.SYMBOLS} == {"Sm", "So"}
    letters = {"train": glyphs.LATIN} | {split: glyphs.CHARACTERS[split] for split in ("val", "test")}
    for split, characters in letters.items():
        assert {unicodedata.name(character).split()[0] for character in characters} <= scripts[split]


def test_a_character_that_the_fonts_lack_is_an_error_not_a_lost_class() -> None:
    with pytest.raises(UserError, match=r"CJK_UNIFIED_IDEOGRAPH.*requirements\.txt"):
        glyphs.faces_of("A漢")


def draw_few(folder: Path, style: glyphs.Style, monkeypatch: pytest.MonkeyPatch, order: int = 1) -> None:
    """Draw a class of each split, in this order or, for -1, in the other."""
    few = list(zip(staging.SPLITS, FEW, strict=True))
    monkeypatch.setattr(glyphs, "CHARACTERS", dict(few[::order]))
    write_images(folder, glyphs.pictures(style, folder), style.name)


@pytest.mark.parametrize("style", [glyphs.PLAIN, glyphs.COLOUR], ids=lambda style: style.name)
def test_pictures_are_the_same_whatever_was_drawn_before(
    style: glyphs.Style, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_few(tmp_path / "once", style, monkeypatch)
    draw_few(tmp_path / "again", style, monkeypatch, order=-1)
    once, again = files_in(tmp_path / "once"), files_in(tmp_path / "again")
    assert once == again
    corners = {Image.open(path).getpixel((0, 0)) for path in (tmp_path / "once").rglob("*.png")}
    assert len(corners) > 0.9 * len(once) == 0.9 * len(FEW) * glyphs.IMAGES_PER_CLASS  # no two draw the same paper
    assert (tmp_path / "once" / "val" / "U+0416_CYRILLIC_CAPITAL_LETTER_ZHE" / "39.png").is_file()


def test_every_glyph_is_dark_on_light_and_inside_the_picture(
    faces: dict[str, list[ImageFont.FreeTypeFont]],
) -> None:
    random = np.random.RandomState(0)
    for character in ALL_CHARACTERS:
        face = faces[character][random.randint(len(faces[character]))]
        image = Image.fromarray(glyphs.picture(glyphs.PLAIN, glyphs.ink_mask(character, face), random))
        ink = np.asarray(image.convert("L")) < 150
        assert (image.size, image.mode) == ((32, 32), "RGB")
        assert 0.01 < ink.mean() < 0.6, character
        assert not ink[[0, -1]].any() and not ink[:, [0, -1]].any(), f"{character} is cut off"


def test_the_contact_sheet_shows_every_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_few(tmp_path, glyphs.PLAIN, monkeypatch)
    sheet = np.asarray(
        contact_sheet(tmp_path, {split: list_classes(tmp_path / split).files for split in staging.SPLITS})
    )
    for row, split in enumerate(staging.SPLITS):
        first = np.asarray(Image.open(next((tmp_path / split).iterdir()) / "00.png"))
        top, left = 26 + 102 * row + 4, 118 + 4  # a heading and a row of 72x72 cells for each split
        assert (sheet[top : top + 64, left : left + 64] == first.repeat(2, axis=0).repeat(2, axis=1)).all()


def normalised(mask: Image.Image) -> np.ndarray:
    """The ink scaled to 14 pixels, blurred, as a vector of mean 0 and length 1: (256,)."""
    scale = 14 / max(mask.size)
    size = [max(1, round(side * scale)) for side in mask.size]
    small = Image.new("L", (16, 16))
    small.paste(mask.resize((size[0], size[1]), Image.Resampling.BOX), ((16 - size[0]) // 2, (16 - size[1]) // 2))
    pixels = np.asarray(small.filter(ImageFilter.GaussianBlur(0.6)), np.float32).ravel()
    return (pixels - pixels.mean()) / np.linalg.norm(pixels - pixels.mean())


def test_no_two_characters_look_alike(faces: dict[str, list[ImageFont.FreeTypeFont]]) -> None:
    """The rule by which the characters were chosen (the comment in glyphs.py), without the turned pictures."""
    common, upright = {}, {}
    for character, fonts in faces.items():
        for font in fonts:
            common[character, font.path] = normalised(glyphs.ink_mask(character, font))
            upright[font.path] = not str(font.getname()[1]).endswith(("Italic", "Oblique"))
    for style in (True, False):
        correlation = np.zeros((len(ALL_CHARACTERS),) * 2)
        shared_faces = np.zeros_like(correlation)
        for path in [path for path, is_upright in upright.items() if is_upright is style]:
            has = np.array([(character, path) in common for character in ALL_CHARACTERS])
            vectors = np.stack([common.get((character, path), np.zeros(256)) for character in ALL_CHARACTERS])
            correlation += vectors @ vectors.T
            shared_faces += np.outer(has, has)
        correlation = np.where(shared_faces >= 2, correlation / np.maximum(shared_faces, 1), 0)
        np.fill_diagonal(correlation, 0)
        worst = np.unravel_index(correlation.argmax(), correlation.shape)
        assert correlation.max() < 0.84, [ALL_CHARACTERS[i] for i in worst]
