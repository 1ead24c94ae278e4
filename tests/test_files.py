"""Replaced files are whole whatever happens to their writers, and processes wait for one another's lock."""

import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from utils.errors import UserError
from utils.files import move_aside, only_process, replace_file, replace_folder, write_csv, write_text

FORK = multiprocessing.get_context("fork")


def started(work: Callable[..., object], *arguments: object) -> Any:
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def write_and_wait(path: Path, ready: Any) -> None:
    with replace_file(path) as file:
        file.write(b"half")
        file.flush()
        ready.set()
        time.sleep(60)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    write_text(path, "old")
    with replace_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(path.parent) == ["file"]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), replace_file(tmp_path / "file") as file:
        file.write(b"new")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]


def test_a_file_has_reached_the_disk_before_it_takes_its_place_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def sync(file: int) -> None:
        synced.append(f"{os.readlink(f'/proc/self/fd/{file}')}, {(tmp_path / 'a').exists()}")

    monkeypatch.setattr(os, "fsync", sync)
    write_text(tmp_path / "a", "new")
    assert len(synced) == 2 and synced[0].endswith(", False") and synced[1] == f"{tmp_path}, True"


def test_what_a_killed_writer_left_is_removed_and_a_living_writers_file_is_not(tmp_path: Path) -> None:
    path, ready = tmp_path / "file", FORK.Event()
    killed = started(write_and_wait, path, ready)
    assert ready.wait(10)
    (under_way,) = names(tmp_path)
    write_text(path, "mine")
    assert names(tmp_path) == sorted([under_way, path.name]), "its writer is alive"
    killed.kill()
    killed.join()
    write_text(path, "mine again")
    assert names(tmp_path) == [path.name] and path.read_text() == "mine again"


def test_what_the_system_refuses_is_a_user_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*file: .*Free some disk space"):
        write_text(tmp_path / "file", "text")
    assert names(tmp_path) == ["file"]


def add_one(path: Path) -> None:
    for _ in range(10):
        with only_process(path.parent):
            write_text(path, str(int(path.read_text()) + 1))


def test_a_lock_without_a_purpose_waits_for_its_turn(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    processes = [started(add_one, tmp_path / "count") for _ in range(3)]
    for process in processes:
        process.join(30)
    assert (tmp_path / "count").read_text() == "30"


def test_a_text_may_hold_names_of_files_that_are_not_unicode(tmp_path: Path) -> None:
    write_text(tmp_path / "results.md", "caf\udce9, café")
    assert (tmp_path / "results.md").read_bytes() == b"caf\\udce9, caf\xc3\xa9"


def test_a_csv_file_has_the_columns_of_all_its_rows(tmp_path: Path) -> None:
    write_csv(tmp_path / "log.csv", [{"epoch": 1, "loss": 2.5}, {"epoch": 2, "skipped": 1, "loss": 1.5}])
    assert (tmp_path / "log.csv").read_text() == "epoch,loss,skipped\n1,2.5,\n2,1.5,1\n"


def test_a_lock_with_a_purpose_says_who_holds_it_and_since_when(tmp_path: Path) -> None:
    holder = rf"process {os.getpid()} on {platform.node()} \(since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\) is training in"
    with only_process(tmp_path, "training"):
        for _ in range(2):  # the one that is refused leaves the note as it is
            with pytest.raises(UserError, match=holder):
                only_process(tmp_path, "training").__enter__()
    with only_process(tmp_path, "training"):
        (tmp_path / ".lock").write_bytes(b"\x1b[31m\xff")
        with pytest.raises(UserError, match="another process is training in"):
            only_process(tmp_path, "training").__enter__()


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with replace_folder(tmp_path / "folder") as folder:
            (folder / "file").write_text(text)
            assert text == "old" or (tmp_path / "folder" / "file").read_text() == "old"
    assert (tmp_path / "folder" / "file").read_text() == "new"
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "folder"):
        raise RuntimeError
    assert (tmp_path / "folder" / "file").read_text() == "new" and names(tmp_path) == ["folder"]


def replace_often(path: Path) -> None:
    for number in range(200):
        with replace_folder(path) as folder:
            (folder / "file").write_text(str(number))


def test_several_writers_of_a_folder_take_turns(tmp_path: Path) -> None:
    writers = [started(replace_often, tmp_path / "folder") for _ in range(3)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert names(tmp_path) == ["folder"] and (tmp_path / "folder" / "file").read_text() == "199"


def test_a_folder_comes_back_where_its_writer_was_killed_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".folder.earlier").mkdir()
    with pytest.raises(UserError, match="no room"), replace_folder(tmp_path / "folder"):
        raise UserError("no room")
    assert names(tmp_path) == ["folder"]


def fill_and_wait(path: Path, ready: Any) -> None:
    with replace_folder(path) as folder:
        (folder / "file").write_text("half")
        ready.set()
        time.sleep(60)


def test_a_folder_that_a_killed_writer_left_is_removed_and_a_living_writers_is_not(tmp_path: Path) -> None:
    ready = FORK.Event()
    killed = started(fill_and_wait, tmp_path / "folder", ready)
    assert ready.wait(10)
    (under_way,) = names(tmp_path)
    write_text(tmp_path / "file", "")
    assert names(tmp_path) == sorted([under_way, "file"]), "its writer is alive"
    killed.kill()
    killed.join()
    with replace_folder(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["file", "folder"]


def test_a_new_folder_that_another_process_takes_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That may happen between its making and its locking."""
    opened = os.open
    taken: list[Path] = []

    def open_late(path: Any, *flags: int) -> int:
        if not taken and Path(path).suffix == ".partial":
            taken.append(Path(path))
            Path(path).rmdir()
        return opened(path, *flags)

    monkeypatch.setattr(os, "open", open_late)
    with replace_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("whole")
    assert taken and names(tmp_path) == ["folder"]


def test_files_that_are_moved_aside_twice_in_a_second_lie_in_two_folders(tmp_path: Path) -> None:
    kept = []
    for text in ("one", "two"):
        (tmp_path / "file").write_text(text)
        kept.append(move_aside([tmp_path / "file"], tmp_path / "until_now"))
    assert [(folder / "file").read_text() for folder in kept] == ["one", "two"]
    with pytest.raises(UserError, match=r"cannot make the folder .*absent/until_now: .*choose another place"):
        move_aside([tmp_path / "until_now"], tmp_path / "absent" / "until_now")
