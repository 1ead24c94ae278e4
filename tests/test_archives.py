"""Archives from elsewhere: every file comes out of every form, and nothing hostile or damaged does."""

import errno
import os
import stat
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocess import archives
from preprocess.archives import members, open_zip
from preprocess.preprocess import prepare
from tests.made_archives import TAR_MODES, left_in, pack, png
from utils.errors import UserError

FORMS = [".zip", *TAR_MODES]
FILES = {"x/train/a/0.png": b"first", "x/train/a/1.png": b"second", "x/readme.txt": b"words"}


def read(path: Path, **options: int) -> list[tuple[str, bytes]]:
    return list(members(path, "the archive", lambda name: name.endswith(".png"), **options))


def refused(path: Path, message: str) -> None:
    """Reading `path`, and making a data set of it, ends in an error that says `message`; nothing is written."""
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert path.name in str(error.value) and ("is damaged" not in str(error.value) or "damaged" in message)
    before = {file: file.stat().st_mtime_ns for file in path.parent.rglob("*")}
    with pytest.raises(UserError, match=message):
        prepare(path.name.split(".")[0], path.parent)
    assert {file: file.stat().st_mtime_ns for file in path.parent.rglob("*")} == before


def tar_with(path: Path, **attributes: object) -> Path:
    """A tar with an image, and one member of the given attributes."""
    with tarfile.open(path, "w:") as tar:
        for info in (tarfile.TarInfo("x/train/a/0.png"), tarfile.TarInfo("x/train/a/1.png")):
            if info.name.endswith("1.png"):
                for name, value in attributes.items():
                    setattr(info, name, value)
            tar.addfile(info)
    return path


def zip_with(path: Path, info: zipfile.ZipInfo, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/train/a/0.png", b"image")
        archive.writestr(info, content)
    return path


# ---------------------------------------------------------------- what is good


@pytest.mark.parametrize("suffix", FORMS)
def test_wanted_files_of_every_form_come_out_in_order(tmp_path: Path, suffix: str) -> None:
    assert read(pack(tmp_path / f"x{suffix}", FILES)) == list(FILES.items())[:2]


def test_a_tar_whose_first_name_starts_like_a_zip_is_a_tar(tmp_path: Path) -> None:
    files = {"PKLot/train/a/0.png": b"first"}
    assert dict(read(pack(tmp_path / "PKLot.tar", files))) == files
    with zipfile.ZipFile(tmp_path / "x.zip", "w"):  # has no members, so it starts with its end
        pass
    assert read(tmp_path / "x.zip") == []


def test_backslashes_in_a_zip_stand_for_folders(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", {name.replace("/", "\\"): content for name, content in FILES.items()})
    assert read(path) == list(FILES.items())[:2]


def test_the_form_is_seen_by_its_bytes_not_by_its_name(tmp_path: Path) -> None:
    for suffix in FORMS:
        pack(tmp_path / f"x{suffix}", FILES).rename(tmp_path / "y.tar")
        assert read(tmp_path / "y.tar") == list(FILES.items())[:2]


def test_long_and_foreign_names_come_out_of_tars_as_they_are(tmp_path: Path) -> None:
    files = {f"x/{'long' * 60}/ä.png": b"1"}
    assert dict(read(pack(tmp_path / "x.tar", files))) == files


def test_reading_a_tar_takes_no_memory_for_the_members_that_are_done(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", {f"x/{i}.png": bytes(100) for i in range(4000)})
    tracemalloc.start()
    assert sum(1 for _ in members(path, "it", lambda name: True)) == 4000
    assert tracemalloc.get_traced_memory()[1] < 1e6  # their headers alone would take several
    tracemalloc.stop()


# ---------------------------------------------------------------- what leads elsewhere


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "x/train/../../../evil.png", "C:\\evil.png", "a\\..\\b"])
def test_a_member_that_leads_out_of_the_folder_is_refused(tmp_path: Path, suffix: str, name: str) -> None:
    refused(pack(tmp_path / f"x{suffix}", FILES | {name: b"evil"}), "leads out")


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
    ids=["symlink", "hard link", "character device", "block device", "fifo"],
)
def test_a_tar_with_a_link_or_a_device_is_refused(tmp_path: Path, kind: bytes) -> None:
    refused(tar_with(tmp_path / "x.tar", type=kind, linkname="/etc/passwd"), r"1\.png' .* is a link or a device")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_a_zip_with_a_link_or_a_device_is_refused(tmp_path: Path, mode: int) -> None:
    info = zipfile.ZipInfo("x/train/a/1.png")
    info.external_attr = (mode | 0o777) << 16
    refused(zip_with(tmp_path / "x.zip", info, b"/etc/passwd"), r"1\.png' .* is a link or a device")


def test_a_sparse_file_in_a_tar_is_refused(tmp_path: Path) -> None:
    headers = {"GNU.sparse.map": "0,5", "GNU.sparse.size": "5"}
    refused(tar_with(tmp_path / "x.tar", pax_headers=headers), "is a link or a device")
    info = tarfile.TarInfo("x/train/a/0.png")
    info.pax_headers, info.size = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, 512
    header = info.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "x.tar").write_bytes(header + b"99\n".ljust(512, b"0") + bytes(1024))  # its list of pieces is none
    refused(tmp_path / "x.tar", "damaged")


@pytest.mark.parametrize("place", ["train/.hidden/a.png", "train/ /..png"])
def test_folders_and_files_that_hide_are_not_taken_for_images(tmp_path: Path, place: str) -> None:
    pack(
        tmp_path / "x.zip", {f"x/{place}": png(0)} | {f"x/{split}/{split}s/0.png": png(0) for split in ("train", "val")}
    )
    made = prepare("x", tmp_path)
    assert sorted(path.name for path in made.rglob("*.png")) == ["0.png", "0.png"]


# ---------------------------------------------------------------- bombs


ZEROS = bytes(2**20)


def test_a_zip_that_declares_far_more_than_it_takes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(70):
            archive.writestr(f"x/train/a/{i}.png", ZEROS)
    refused(tmp_path / "x.zip", r"takes 0\.1 MB but unpacks to 73 MB or more, .*not unpacked")


@pytest.mark.parametrize("name", ["x/train/a/{}.png", "unwanted/{}"])
def test_a_compressed_tar_that_gives_far_more_than_it_takes_is_stopped(tmp_path: Path, name: str) -> None:
    path = pack(tmp_path / "x.tar.gz", {name.format(i): ZEROS for i in range(70)})
    refused(path, "unpacks to 67 MB or more")


def test_a_zip_member_larger_than_declared_is_cut_there_and_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/train/a/0.png", ZEROS)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", len(ZEROS)), struct.pack("<I", 10)))
    refused(path, "damaged")


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["deflate", "bzip2", "lzma"]
)
def test_a_zip_member_that_lies_about_its_size_takes_no_memory(tmp_path: Path, method: int) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("x/train/a/0.png", "w") as member:
        for _ in range(64):
            member.write(ZEROS)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 64 * len(ZEROS)), struct.pack("<I", 10)))
    tracemalloc.start()
    refused(path, "damaged" if method == zipfile.ZIP_DEFLATED else "0.png' in .* is packed with (bzip2|lzma)")
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_a_member_larger_than_any_image_is_refused(tmp_path: Path) -> None:
    for suffix in FORMS:
        path = pack(tmp_path / f"x{suffix}", FILES)
        assert len(read(path, max_bytes=6)) == 2
        with pytest.raises(UserError, match="more than it can need"):
            read(path, max_bytes=5)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_more_members_than_any_data_set_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = pack(tmp_path / f"x{suffix}", FILES)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    assert len(read(path)) == 2
    monkeypatch.setattr(archives, "MAX_MEMBERS", 2)
    refused(path, "more than 2 members")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
def test_a_tar_header_that_would_fill_the_memory_is_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 2**30
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    (tmp_path / "x.tar").write_bytes(block + bytes(20 * 512))
    refused(tmp_path / "x.tar", "damaged.*header of type")


def test_tar_headers_nested_without_end_are_an_error(tmp_path: Path) -> None:
    header = tarfile.TarInfo.create_pax_global_header({"a": "b"})
    (tmp_path / "x.tar").write_bytes(header * 2000)
    refused(tmp_path / "x.tar", "damaged")


# ---------------------------------------------------------------- damage


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """Change a byte in the middle, which lies in an image."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", lambda data: b"x" * 5000])
def test_a_damaged_archive_is_an_error_and_leaves_nothing(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    path = pack(tmp_path / f"x{suffix}", {f"x/train/a/{i}.png": png(i, 32) for i in range(8)})
    path.write_bytes(damage(path.read_bytes()))
    refused(path, "damaged or not an archive of its kind.*Fetch")


def test_damage_in_a_plain_tar_which_has_no_checksums_is_seen_in_the_image(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", {f"x/train/a/{i}.png": png(i, 32) for i in range(8)})
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT", 3000) + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"1 image cannot be read: train/a/\d\.png \(SyntaxError: broken PNG"):
        prepare("x", tmp_path)
    assert left_in(tmp_path) == []


def test_a_damaged_header_amid_a_tar_is_not_taken_for_its_end(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", FILES)
    data = bytearray(path.read_bytes())
    data[1024 + 150] ^= 1  # in the checksum of the second member's header
    path.write_bytes(data)
    refused(path, "damaged.*in the middle")
    path.write_bytes(data[:1024])  # no second member at all, nor the two blocks that end a tar
    refused(path, "damaged.*in the middle")
    path.write_bytes(data[:1024] + bytes(512))  # one of the two
    refused(path, r"damaged.*cut off")


def test_a_zip_member_without_a_name_is_called_damage(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", FILES)
    path.write_bytes(path.read_bytes().replace(b"x/readme.txt", b"\0/readme.txt"))
    refused(path, "damaged")


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_names_from_an_archive_cannot_act_on_the_terminal(tmp_path: Path, suffix: str) -> None:
    path = pack(tmp_path / f"x{suffix}", {"x/train/a/\x1b[31m.png": b"image"})
    with pytest.raises(UserError, match="more than it can need") as error:
        read(path, max_bytes=1)
    assert str(error.value).isprintable()


def test_an_encrypted_zip_says_so(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", FILES)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    refused(path, "encrypted")


@pytest.mark.parametrize("suffix", [".zip", ".tar.bz2"])
def test_a_download_that_ended_in_a_web_page_is_called_so(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(b"\n<!DOCTYPE html><title>Google Drive - Virus scan warning</title>")
    refused(tmp_path / f"x{suffix}", "is a web page, not an archive")


def test_a_full_disk_while_a_zip_is_read_is_not_called_damage(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"), open_zip(pack(tmp_path / "x.zip", FILES), "it"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_name_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        warnings.simplefilter("ignore")  # zipfile warns of it
        for seed in (0, 1):
            archive.writestr("train/a/0.png", png(seed))
    with pytest.raises(UserError, match=r"class 'a' has two images named 0\.png"):
        prepare("x", tmp_path)
    assert left_in(tmp_path) == []
