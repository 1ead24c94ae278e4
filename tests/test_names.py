"""Names of data sets are forgiving, and ambiguity is an error that names both folders."""

import os
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.names import KNOWN, can_name_a_file, canonical_name, find_dataset, turns_classes


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("CIFAR-FS", "CIFAR_FS"),
        ("cifar_fs", "CIFAR_FS"),
        ("cifarfs", "CIFAR_FS"),
        ("miniImageNet", "mini_imagenet"),
        ("tieredImageNet", "tiered_imagenet"),
        ("Mini ImageNet", "mini_imagenet"),
        ("glyphs_color", "glyphs_colour"),
        ("Glyphs-Colour", "glyphs_colour"),
        ("fc-100", "FC100"),
        ("cub", "CUB"),
    ],
)
def test_spellings_of_a_known_data_set_become_its_canonical_name(typed: str, canonical: str) -> None:
    assert canonical_name(typed) == canonical


@pytest.mark.parametrize("text", ["", " ", "a\nb", "a\0b", "\x1b[31m", "\ud800"])
def test_odd_text_cannot_name_a_file(text: str) -> None:
    assert not can_name_a_file(text)
    assert can_name_a_file("Ünïcode 💥") and can_name_a_file(os.fsdecode(b"latin-1 \xe9"))


def test_canonical_names_and_unknown_names_come_back_unchanged() -> None:
    for name in (*KNOWN, "My-Butterflies", "glyphs2", ""):
        assert canonical_name(name) == name


@pytest.mark.parametrize("typed", ["CIFAR-FS", "CIFAR_FS", "cifar_fs"])
@pytest.mark.parametrize("on_disk", ["CIFAR-FS", "CIFAR_FS", "cifar_fs"])
def test_every_spelling_finds_the_folder_in_any_spelling(tmp_path: Path, typed: str, on_disk: str) -> None:
    (tmp_path / on_disk).mkdir()
    (tmp_path / "cifar_fs.zip").touch()
    assert find_dataset(tmp_path, typed) == tmp_path / on_disk


@pytest.mark.parametrize("typed", ["glyphs_colour", "glyphs_color", "Glyphs-Color"])
@pytest.mark.parametrize("on_disk", ["glyphs_colour", "glyphs_color", "glyphs-color"])
def test_color_and_colour_are_one_spelling(tmp_path: Path, typed: str, on_disk: str) -> None:
    (tmp_path / on_disk).mkdir()
    assert find_dataset(tmp_path, typed) == tmp_path / on_disk


def test_classes_are_turned_where_the_data_set_says_so() -> None:
    assert [name for name in KNOWN if turns_classes(name)] == ["omniglot"]
    assert turns_classes("Omniglot-dataset") and not turns_classes("my_letters")


def test_an_unknown_name_finds_its_folder_by_the_same_rule(tmp_path: Path) -> None:
    (tmp_path / "my_butterflies").mkdir()
    assert find_dataset(tmp_path, "My-Butterflies") == tmp_path / "my_butterflies"


def test_a_missing_data_set_is_where_it_belongs_and_no_error(tmp_path: Path) -> None:
    assert find_dataset(tmp_path, "cifar-fs") == tmp_path / "CIFAR_FS"
    assert find_dataset(tmp_path / "nowhere", "cifar-fs") == tmp_path / "nowhere" / "CIFAR_FS"
    (tmp_path / "CUB").write_text("a file is not a data set")
    assert find_dataset(tmp_path, "cub") == tmp_path / "CUB"


def test_of_two_spellings_the_exact_one_wins_and_otherwise_both_are_named(tmp_path: Path) -> None:
    for name in ("CIFAR-FS", "CIFAR_FS"):
        (tmp_path / name).mkdir()
    assert find_dataset(tmp_path, "CIFAR-FS") == tmp_path / "CIFAR-FS"
    with pytest.raises(UserError, match="CIFAR-FS and CIFAR_FS"):
        find_dataset(tmp_path, "cifar_fs")
