"""A user's own images become a data set: class folders split by chance, or any images split by CSV files."""

import argparse
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from preprocess import staging
from preprocess.class_folders import add_options, draw_split, from_csv, maker, read_rows, split_folder
from preprocess.preprocess import main
from utils.errors import UserError
from utils.images import list_classes

THIRDS = (0.5, 0.25, 0.25)
COUNTS = "train 4 classes, 8 images; val 2 classes, 4 images; test 2 classes, 4 images"  # of all photos split so


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), level).save(file, "png")
    return file.getvalue()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """tmp_path/photos: 8 classes of 2 images of the same names, and what else lies about."""
    for index, name in enumerate(["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(2):
            (folder / f"{number}.png").write_bytes(png(10 * index + number))
    (tmp_path / "photos" / "ant" / "notes.txt").write_text("x")
    (tmp_path / "photos" / "README.md").write_text("x")
    (tmp_path / "photos" / ".hidden").mkdir()
    return tmp_path / "photos"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


def options(*arguments: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--datasets", nargs="+")
    parser.add_argument("--dataset_dir", type=Path, default=Path("datasets"))
    add_options(parser)
    return parser.parse_args(["--datasets", "mine", *map(str, arguments)])


def make(target: Path, *arguments: str | Path) -> staging.Contents:
    made = maker(options(*arguments))
    assert made is not None
    return made.fill(target)


# ---------------------------------------------------------------- class folders


def test_class_folders_are_copied_whole_and_the_originals_stay_as_they_were(photos: Path, target: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in photos.rglob("*")}
    contents = make(target, "--from_folder", photos, "--split", "0.5", "0.25", "0.25")
    assert {path: path.stat().st_mtime_ns for path in photos.rglob("*")} == before
    assert {split: len(classes) for split, classes in contents.items()} == {"train": 4, "val": 2, "test": 2}
    assert contents == staging.count_images(target)
    copied = {name.partition("/")[2]: content for name, content in files_in(target).items()}
    assert copied == {name: content for name, content in files_in(photos).items() if name.endswith(".png")}
    assert not any(path.is_symlink() for path in target.rglob("*"))


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    names = [f"class{i:03d}" for i in range(100)]
    split = draw_split(names, (0.64, 0.16, 0.2), seed=0)
    assert draw_split(names[::-1], (0.64, 0.16, 0.2), seed=0) == split
    assert draw_split(names, (0.64, 0.16, 0.2), seed=1) != split
    assert [list(split.values()).count(part) for part in staging.SPLITS] == [64, 16, 20]
    assert draw_split("abcdef", THIRDS, 0) == {  # on every machine
        "f": "train", "c": "train", "b": "train", "d": "val", "a": "test", "e": "test",
    }  # fmt: skip


@pytest.mark.parametrize("total", range(3, 12))
@pytest.mark.parametrize(
    "fractions", [(0.98, 0.01, 0.01), (0.01, 0.98, 0.01), (0.01, 0.01, 0.98), (0.1, 0.45, 0.45), (0.64, 0.16, 0.2)]
)
def test_every_split_gets_a_class_and_every_class_a_split(total: int, fractions: tuple[float, float, float]) -> None:
    names = [str(number) for number in range(total)]
    split = draw_split(names, fractions, 0)
    assert sorted(split) == sorted(names) and set(split.values()) == set(staging.SPLITS)
    for part, fraction in zip(staging.SPLITS, fractions, strict=True):
        assert abs(list(split.values()).count(part) - fraction * total) < 2.1


def test_fewer_than_three_classes_are_too_few(photos: Path, target: Path) -> None:
    for name in ["cat", "dog", "eel", "fox", "gnu", "hen"]:
        for file in (photos / name).iterdir():
            file.unlink()
        (photos / name).rmdir()
    with pytest.raises(UserError, match=r"2 classes \(ant, bee\) are too few for train, val and test"):
        split_folder(photos, THIRDS, 0, target)


def test_a_folder_that_is_split_already_is_refused_but_a_class_may_be_called_train(photos: Path, target: Path) -> None:
    (photos / "ant").rename(photos / "train")
    assert "train" in draw_split([path.name for path in photos.iterdir()], THIRDS, 0)
    contents = split_folder(photos, THIRDS, 0, target)
    assert sum("train" in classes for classes in contents.values()) == 1
    with pytest.raises(UserError, match="is split already, into test, train, val: it needs no --from_folder"):
        split_folder(target, THIRDS, 0, target)


def test_an_empty_class_and_an_unreadable_image_are_named(photos: Path, target: Path) -> None:
    (photos / "cow").mkdir()
    with pytest.raises(UserError, match=r"class folder .*cow holds no images.* add some or remove the folder"):
        split_folder(photos, THIRDS, 0, target)
    (photos / "cow" / "0.png").write_bytes(png(1)[:30])
    with pytest.raises(UserError, match=r"1 image cannot be read: \w+/cow/0\.png"):
        split_folder(photos, THIRDS, 0, target)


def test_a_folder_one_level_too_high_is_told_apart_from_an_empty_class(photos: Path) -> None:
    (photos / "README.md").rename(photos.parent / "README.md")
    with pytest.raises(UserError, match=rf"is {photos} the folder of the class folders \(ant, \.\.\.\)\?"):
        list_classes(photos.parent)


def test_images_that_are_not_directly_in_a_class_folder_are_noted(
    photos: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split_folder(photos, THIRDS, 0, target / "all")
    assert capsys.readouterr().out == ""
    for name in ("loose.jpg", "ant/more/9.PNG", ".hidden/0.png", "ant/._0.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(png(1))
    split_folder(photos, THIRDS, 0, target / "without")
    said = capsys.readouterr().out
    assert f"warning: 2 images are not directly in a class folder {photos}/CLASS and are left out" in said
    assert f"'{photos}/ant/more/9.PNG' among them" in said


def test_an_image_of_ones_own_that_cannot_be_read_is_to_be_mended_not_fetched(photos: Path, target: Path) -> None:
    (photos / "ant" / "0.png").write_bytes(png(1)[:30])
    with pytest.raises(UserError, match=r"1 image cannot be read: .*Mend what is named, or move it out") as error:
        split_folder(photos, THIRDS, 0, target)
    assert "archive" not in str(error.value)
    (photos / "ant" / "0.png").unlink()
    (photos / "ant" / "0.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot read the image '.*ant/0\.png': No such file.*Mend"):
        split_folder(photos, THIRDS, 0, target / "again")


# ---------------------------------------------------------------- CSV files


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """mini-ImageNet's form: tmp_path/images/*.png, and train.csv, val.csv, test.csv in it."""
    (tmp_path / "images").mkdir()
    for split, classes in {"train": ("n01", "n02"), "val": ("n03",), "test": ("n04",)}.items():
        lines = ["filename,label"]
        for label in classes:
            for number in range(2):
                (tmp_path / "images" / f"{label}{number}.png").write_bytes(png(int(label[1:]) * 10 + number))
                lines.append(f"{label}{number}.png,{label}")
        (tmp_path / "images" / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "images"


CSVS = [Path("train.csv"), Path("val.csv"), Path("test.csv")]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_three_csv_files_split_a_folder_of_images(flat: Path, target: Path) -> None:
    contents = make(target, "--from_folder", flat, "--csv", *CSVS)
    assert contents == {"train": {"n01": 2, "n02": 2}, "val": {"n03": 2}, "test": {"n04": 2}}
    assert files_in(target) == {
        f"{split}/{name[:3]}/{name}": (flat / name).read_bytes()
        for split, classes in contents.items()
        for name in (f"{label}{number}.png" for label in classes for number in range(2))
    }


def test_csv_files_elsewhere_and_images_in_class_folders_do_too(photos: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    for split, label in zip(staging.SPLITS, ("ant", "bee", "cat"), strict=True):
        text = f'\ufeffindex,Label, filename\r\n1,{label},"0.png"\r\n\r\n2,{label},{label}/1.png\r\n'  # as Excel writes
        (tmp_path / "lists" / f"{split}.csv").write_bytes(text.encode())
    contents = from_csv(photos, [tmp_path / "lists" / path for path in CSVS], target)
    assert contents == {"train": {"ant": 2}, "val": {"bee": 2}, "test": {"cat": 2}}
    assert files_in(target)["val/bee/1.png"] == (photos / "bee" / "1.png").read_bytes()


def test_one_csv_file_with_a_split_column_is_enough(flat: Path, target: Path) -> None:
    lines = ["filename,label,split", "n010.png,n01,train", "n030.png,n03,valid", "n040.png,n04,Test"]
    (flat / "all.csv").write_text("\n".join(lines))
    assert from_csv(flat, [flat / "all.csv"], target) == {"train": {"n01": 1}, "val": {"n03": 1}, "test": {"n04": 1}}
    edit(flat / "all.csv", "valid", "dev")
    with pytest.raises(UserError, match=r"all\.csv, line 3: split 'dev' is none of train, val, test"):
        from_csv(flat, [flat / "all.csv"], target)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "val.csv",
            "n031.png,n03",
            "n031.png,n01",
            r"class 'n01' is in two splits, train \(train\.csv, line 2\) and val",
        ),
        ("val.csv", "n031.png,n03", "n031.png,../n03", r"val\.csv, line 3: label '\.\./n03' cannot be the name"),
        ("val.csv", "n031.png,n03", "n031.png,a\\b", r"label 'a\\\\b' cannot be the name"),
        ("val.csv", "n031.png,n03", "n031.png,.n03", r"label '\.n03' cannot be the name"),
        ("val.csv", "n031.png,n03", "n031.png", r"val\.csv, line 3: filename or label is missing"),
        ("val.csv", "n031.png", "../train.csv", r"val\.csv, line 3: file name '\.\./train\.csv' leads out"),
        ("val.csv", "n031.png", "/etc/passwd", "leads out of the folder"),
        ("val.csv", "n031.png", "C:x.png", "leads out of the folder"),
        ("val.csv", "n031.png", ".n031.png", "leads out of the folder of images, is hidden"),
        (
            "val.csv",
            "n031.png",
            "n030.png",
            r"line 3: n030\.png of class 'n03' is there already .*\(val\.csv, line 2\)",
        ),
        ("val.csv", "n031.png", "n010.png", r"n010\.png of class 'n03' is there already as n010\.png of class 'n01'"),
        ("val.csv", "n031.png", "sub/n030.png", r"sub/n030\.png of class 'n03' is there already as n030\.png"),
        ("val.csv", "n031.png", "lost.png", r"1 of 8 listed images are neither .*: lost\.png \(val\.csv, line 3\)$"),
        (
            "val.csv",
            "filename,label",
            "file,class",
            r"val\.csv must start with a line filename,label; it .*'file,class'",
        ),
        ("val.csv", "filename,label", "", "val.csv must start with"),
        ("val.csv", "n030.png,n03\nn031.png,n03\n", "", "no class for val: each split needs at least one"),
        ("val.csv", "n031.png,n03", '"n031.png', r"cannot read val\.csv \(unexpected end of data"),
    ],
)
def test_what_is_wrong_in_a_csv_file_is_named_with_its_line_and_nothing_is_copied(
    flat: Path, target: Path, file: str, old: str, new: str, message: str
) -> None:
    (flat / "sub").mkdir()
    (flat / "sub" / "n030.png").write_bytes(png(1))
    (flat / ".n031.png").write_bytes(png(1))
    edit(flat / file, old, new)
    with pytest.raises(UserError, match=message):
        from_csv(flat, CSVS, target)
    assert files_in(target) == {}


def test_csv_files_that_are_missing_out_of_order_too_few_or_no_text_are_named(flat: Path) -> None:
    with pytest.raises(UserError, match=r"val\.csv in the place of train: give train\.csv val\.csv test\.csv"):
        read_rows(flat, [CSVS[1], CSVS[0], CSVS[2]])
    with pytest.raises(UserError, match="or one file with a column split; not 2"):
        read_rows(flat, CSVS[:2])
    (flat / "test.csv").write_bytes(b"filename,label\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"cannot read test\.csv \('utf-8' codec"):
        read_rows(flat, CSVS)
    (flat / "test.csv").unlink()
    with pytest.raises(UserError, match=r"cannot read test\.csv \(.*No such file.*looked for as given, then in"):
        read_rows(flat, CSVS)


# ---------------------------------------------------------------- options


def test_without_from_folder_there_is_nothing_to_make() -> None:
    assert maker(options()) is None
    for left in (["--seed", "0"], ["--split", "1", "0", "0"], ["--csv", "all.csv"]):
        with pytest.raises(UserError, match="say how to split --from_folder"):
            maker(options(*left))


@pytest.mark.parametrize("fractions", ["0.6 0.2 0.3", "0.8 0.2 0", "1.2 -0.1 -0.1", "nan 0.5 0.5", "64 16 20"])
def test_shares_that_are_not_positive_or_do_not_sum_to_1_are_refused(photos: Path, fractions: str) -> None:
    with pytest.raises(UserError, match=rf"--split {fractions} sums to .*three positive shares that sum to 1"):
        maker(options("--from_folder", photos, "--split", *fractions.split()))
    assert maker(options("--from_folder", photos, "--split", "0.33333333", "0.33333333", "0.33333333"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --split TRAIN VAL TEST or --csv"),
        (["--split", "0.6", "0.2", "0.2", "--csv", "all.csv"], "and not both"),
        (["--split", "0.6", "0.2", "0.2", "--seed", "-1"], "--seed -1 is not between"),
        (["--split", "0.6", "0.2", "0.2", "--datasets", "one", "two"], "give --datasets one name, not one two"),
        (["--split", "0.6", "0.2", "0.2", "--datasets", "../out"], r"give --datasets one name, not \.\./out"),
        (["--csv", "all.csv", "--seed", "1"], "--seed goes with --split"),
    ],
)
def test_options_that_contradict_each_other_are_named(photos: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        maker(options("--from_folder", photos, *arguments))


def test_the_data_set_cannot_be_made_inside_the_users_folder(photos: Path, tmp_path: Path) -> None:
    split = ["--split", "0.6", "0.2", "0.2"]
    for inside in (photos, photos / "new", photos / ".." / "photos" / "ant"):
        with pytest.raises(UserError, match=r"in it and must stay as it is: choose another --dataset_dir"):
            maker(options("--from_folder", photos, *split, "--dataset_dir", inside))
    assert maker(options("--from_folder", photos, *split, "--dataset_dir", tmp_path))
    with pytest.raises(UserError, match=r"--from_folder .*README\.md is not a folder"):
        maker(options("--from_folder", photos / "README.md", *split))


def test_a_data_set_of_ones_own_images_cannot_take_their_place(photos: Path, tmp_path: Path) -> None:
    split: list[str | Path] = ["--split", "0.6", "0.2", "0.2", "--dataset_dir", tmp_path, "--datasets", "Photos"]
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"lies where the data set would be made, .*give another --datasets name"):
        maker(options("--from_folder", photos, *split))
    assert maker(options("--from_folder", photos, *split, "--dataset_dir", tmp_path / "other"))


def test_another_split_of_a_data_set_that_is_there_is_an_error(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*changes: str) -> tuple[int, str]:
        split = ["--from_folder", str(photos), "--split", "0.5", "0.25", "0.25"]
        code = main(["--datasets", "mine", "--dataset_dir", str(tmp_path), *split, *changes])
        return code, "".join(capsys.readouterr())

    made = f"made from --from_folder {photos} --split 0.5 0.25 0.25 --seed 0"
    assert run() == (0, f"{tmp_path}/mine is ready: {COUNTS} ({made})\n")
    before = files_in(tmp_path)
    (tmp_path / "other").mkdir()
    assert run() == run("--seed", "0") == (0, f"{tmp_path}/mine is there already and left alone: {COUNTS} ({made})\n")
    for changes in (
        ["--seed", "7"],
        ["--split", "0.25", "0.5", "0.25"],
        ["--from_folder", str(tmp_path / "other")],
    ):
        code, said = run(*changes)
        assert code == 2 and f"mine is there already, {made}; this command asks for --from_folder" in said
    record = tmp_path / "mine" / staging.CONTENTS_FILE
    assert files_in(tmp_path) == before
    content = json.loads(record.read_text())
    record.write_text(json.dumps({split: content[split] for split in staging.SPLITS}))
    assert run("--seed", "7")[0] == 0  # as older versions wrote it: not known
    record.unlink()
    code, said = run()
    assert code == 2 and "made from files that were put there; this command asks for" in said


def test_ones_own_images_do_not_pass_for_a_published_data_set(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--from_folder", str(photos), "--split", "0.5", "0.25", "0.25", "--dataset_dir", str(tmp_path)]
    for _ in range(2):
        assert main(["--datasets", "CIFAR_FS", *arguments]) == 0
        assert "not the published data set: train has 4 classes, 60 fewer than 64" in capsys.readouterr().out
