"""Splits are read exactly, cached safely, and drawn from as the official sampler does."""

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from data import Episodes, base_seed, check_tests, sample_task
from tests.golden import facts
from utils.errors import UserError
from utils.image_cache import Split, open_split
from utils.images import decode_image, list_classes
from utils.options import Options

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
UNSHARE = ["unshare", "--map-root-user", "--mount"]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _write(path: Path, width: int = 8, height: int = 8, seed: int = 0) -> Path:
    """A noise image; its pixels depend on the seed only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    """A data set folder with TOYS/train: classes a, b, c of 3 images and the same file names."""
    for k, name in enumerate("abc"):
        for i in range(3):
            _write(tmp_path / f"TOYS/train/{name}/{i}.png", seed=10 * k + i)
    return tmp_path


def _toys(dataset_dir: Path, **options: object) -> Split:
    return open_split(dataset_dir, "TOYS", "train", (3, 8, 8), **options)  # type: ignore[arg-type]


def _identity(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


def _cache(dataset_dir: Path, suffix: str) -> Path:
    return dataset_dir / f".cache/TOYS/train_3x8x8.{suffix}"


@pytest.fixture(scope="module")
def cifar_fs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set folder with CIFAR_FS, unpacked from the small real archive."""
    folder = tmp_path_factory.mktemp("datasets")
    with zipfile.ZipFile(shared / "data/cifar_fs_small.zip") as archive:
        for split in ("train", "val", "test"):
            classes = archive.read(f"cifar100/splits/bertinetto/{split}.txt").decode().split()
            for member in archive.namelist():
                parts = Path(member).parts
                if parts[1] == "data" and parts[2] in classes:
                    target = folder / "CIFAR_FS" / split / parts[2] / parts[3]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(member))
    return folder


# --- reading images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_real_split_is_in_the_cache_pixel_by_pixel(cifar_fs: Path, split: str) -> None:
    data = open_split(cifar_fs, "cifar-fs", split, (3, 32, 32))
    folders = sorted((cifar_fs / "CIFAR_FS" / split).iterdir())
    assert data.class_names == [folder.name for folder in folders]
    expected = [np.asarray(Image.open(file)) for folder in folders for file in sorted(folder.iterdir())]
    np.testing.assert_array_equal(data.images, np.stack(expected))
    assert data.class_sizes.tolist() == [len(list(folder.iterdir())) for folder in folders]
    assert ("train" in data.class_names) == (split == "train")  # the class `train` is no split
    np.testing.assert_allclose(data.mean, (np.stack(expected) / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, (np.stack(expected) / 255).std(axis=(0, 1, 2)), rtol=1e-12)


def test_any_number_of_workers_gives_the_same_array(cifar_fs: Path, tmp_path: Path) -> None:
    (tmp_path / "CIFAR_FS").symlink_to(cifar_fs / "CIFAR_FS")
    arrays = []
    for workers in (1, 3):
        shutil.rmtree(tmp_path / ".cache", ignore_errors=True)
        arrays.append(open_split(tmp_path, "CIFAR_FS", "train", (3, 84, 84), workers=workers).images)
    assert len(arrays[0]) == 8 * 40
    np.testing.assert_array_equal(arrays[0], arrays[1])


def test_images_are_resized_to_height_and_width_in_that_order(tmp_path: Path) -> None:
    file = _write(tmp_path / "TOYS/train/a/wide.png", width=30, height=20)
    images = open_split(tmp_path, "TOYS", "train", (3, 16, 24)).images
    expected = Image.open(file).resize((24, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(images, np.asarray(expected)[None])


def _painted(mode: str, *pixels: Any) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def _palette(transparent: int | None = None) -> Image.Image:
    image = _painted("P", 0, 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (_painted("L", 7, 250), [(7, 7, 7), (250, 250, 250)]),
        (_painted("1", 0, 255), [(0, 0, 0), (255, 255, 255)]),
        (_palette(), [(10, 20, 30), (200, 100, 50)]),
        (_palette(transparent=1), [(10, 20, 30), (255, 255, 255)]),
        (_painted("RGBA", (255, 0, 0, 0), (0, 0, 0, 51)), [(255, 255, 255), (204, 204, 204)]),
        (_painted("LA", (9, 255), (9, 0)), [(9, 9, 9), (255, 255, 255)]),
        (_painted("I;16", 0, 12 * 257), [(0, 0, 0), (12, 12, 12)]),
        (_painted("I;16", 128, 65535), [(0, 0, 0), (255, 255, 255)]),
    ],
    ids=["grey", "bilevel", "palette", "clear palette", "alpha", "grey alpha", "16 bit", "16 bit ends"],
)
def test_every_image_mode_becomes_rgb(tmp_path: Path, image: Image.Image, expected: list[Any]) -> None:
    image.save(tmp_path / "image.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "image.png", (3, 1, 2)), [expected])


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    decoded = decode_image(tmp_path / "red.jpg", (3, 16, 16)).astype(int)
    assert abs(decoded - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("channels", [1, 3])
def test_lab_images_are_read_in_colour_and_in_grey(channels: int, tmp_path: Path) -> None:
    Image.new("LAB", (2, 1), (255, 128, 128)).save(tmp_path / "white.tiff")
    decoded = decode_image(tmp_path / "white.tiff", (channels, 1, 2))
    assert decoded.shape == (1, 2, channels) and (decoded > 250).all()


def test_exif_orientation_turns_the_image_upright(tmp_path: Path) -> None:
    upright = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(3, 2) * 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90° anticlockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(decode_image(tmp_path / "turned.png", (1, 3, 2))[..., 0], np.asarray(upright))


def test_one_channel_gives_grey_images(toys: Path) -> None:
    images = open_split(toys, "TOYS", "train", (1, 8, 8)).images
    assert images.shape == (9, 8, 8, 1)
    expected = Image.open(toys / "TOYS/train/b/2.png").convert("L")
    np.testing.assert_array_equal(images[5, ..., 0], np.asarray(expected))


def test_files_that_are_not_images_and_hidden_ones_are_ignored(toys: Path) -> None:
    for name in ("labels.txt", ".DS_Store", "Thumbs.db", "._0.png", "Icon\r", "desktop.ini"):
        (toys / "TOYS/train/a" / name).write_text("no image")
        (toys / "TOYS/train" / name).write_text("no image")
    (toys / "TOYS/train/__MACOSX").mkdir()
    (toys / "TOYS/train/a/subfolder").mkdir()
    os.mkfifo(toys / "TOYS/train/a/pipe.png")  # to open it would block for ever
    data = _toys(toys)
    assert (data.class_names, data.class_sizes.tolist()) == (["a", "b", "c"], [3, 3, 3])


def test_a_link_to_a_class_folder_is_a_class(toys: Path) -> None:
    (toys / "TOYS/train/d").symlink_to(toys / "TOYS/train/a")
    data = _toys(toys)
    assert data.class_names == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(data.images[9:], data.images[:3])


# --- bad input ---------------------------------------------------------------------------------------------


def test_missing_data_set_says_what_to_put_where(toys: Path) -> None:
    with pytest.raises(UserError) as error:
        open_split(toys, "cifar-fs", "train", (3, 8, 8))
    for part in (f"{toys}/CIFAR_FS/{{train,val,test}}/CLASS", "preprocess.py --datasets CIFAR_FS", "TOYS"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="none"):
        open_split(toys / "nowhere", "cifar-fs", "train", (3, 8, 8))


def test_missing_split_says_which_there_are(toys: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'test'; it has: train\. .*TOYS/test/CLASS"):
        open_split(toys, "TOYS", "test", (3, 8, 8))


def test_split_without_class_folders_is_an_error(tmp_path: Path) -> None:
    _write(tmp_path / "TOYS/train/0.png")
    with pytest.raises(UserError, match="TOYS/train holds no class folders"):
        _toys(tmp_path)


def test_empty_class_folder_is_named(toys: Path) -> None:
    (toys / "TOYS/train/hollow").mkdir()
    (toys / "TOYS/train/hollow/readme.txt").touch()
    with pytest.raises(UserError, match="TOYS/train/hollow holds no images"):
        _toys(toys)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _dangle(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere.png")


SPOILERS: list[Callable[[Path], object]] = [
    _truncate,
    _dangle,
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"<html>404 Not Found</html>"),
    lambda file: Image.new("F", (8, 8)).save(file, "TIFF"),
    lambda file: Image.new("L", (20_000, 20_000)).save(file),  # a decompression bomb to Pillow
    lambda file: Image.new("1", (9_500, 9_500)).save(file),  # Pillow would only warn
    lambda file: Image.new("L", (8, 8)).save(file, "PCX"),  # not among the formats that are read
]


@pytest.mark.parametrize(
    "spoil", SPOILERS, ids=["truncated", "dangling", "empty", "html", "float", "bomb", "large", "pcx"]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_image_is_named_and_can_be_skipped(
    toys: Path, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    whole = np.array(_toys(toys).images)
    spoil(toys / "TOYS/train/b/1.png")
    with pytest.raises(UserError, match=r"1 unreadable image: .*TOYS/train/b/1\.png.*--skip_bad_images true"):
        _toys(toys)
    for _ in range(2):  # built, then from the cache: warns each time
        caplog.clear()
        data = _toys(toys, skip_bad_images=True)
        assert "1 unreadable image" in caplog.text and "b/1.png" in caplog.text
        assert data.class_sizes.tolist() == [3, 2, 3]
        np.testing.assert_array_equal(data.images, np.delete(whole, 4, axis=0))
    with pytest.raises(UserError, match="unreadable"):  # a cache made by skipping does not hide the damage
        _toys(toys)


def test_class_of_which_no_image_can_be_read_is_named(toys: Path) -> None:
    for file in (toys / "TOYS/train/c").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="TOYS/train/c can be read"):
        _toys(toys, skip_bad_images=True)
    assert not list((toys / ".cache").rglob("*.*")), "nothing half-made may stay"


# --- the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"[1]", b"{}", b"[" * 100_000, b'{"format": 2, "fingerprint": "ours"}'])
def test_a_cache_whose_description_is_of_another_kind_is_built_anew(toys: Path, text: bytes) -> None:
    """Even where the array ends with the hash of that description."""
    expected = np.array(_toys(toys).images)
    array, fingerprint = _cache(toys, "npy"), list_classes(toys / "TOYS" / "train").fingerprint
    text = text.replace(b"ours", fingerprint.encode())
    _cache(toys, "json").write_bytes(text)
    array.write_bytes(array.read_bytes()[:-32] + hashlib.sha256(text).digest())
    np.testing.assert_array_equal(_toys(toys).images, expected)


def test_cache_is_used_again_and_holds_its_statistics(toys: Path) -> None:
    first = _toys(toys)
    before = _identity(_cache(toys, "npy"))
    again = _toys(toys)
    assert _identity(_cache(toys, "npy")) == before
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.mean, first.std, first.class_names) == (again.mean, again.std, again.class_names)
    assert isinstance(again.images, np.memmap) and not again.images.flags.writeable


def test_added_removed_and_changed_images_rebuild_the_cache(toys: Path) -> None:
    _toys(toys)
    added = _write(toys / "TOYS/train/a/9.png", seed=99)
    assert _toys(toys).class_sizes.tolist() == [4, 3, 3]
    added.unlink()
    assert _toys(toys).class_sizes.tolist() == [3, 3, 3]
    changed = _write(toys / "TOYS/train/a/0.png", seed=77)
    np.testing.assert_array_equal(_toys(toys).images[0], np.asarray(Image.open(changed)))


def test_array_and_metadata_of_different_builds_do_not_match(toys: Path) -> None:
    """Two builders that saw different files may leave the array of one beside the metadata of the other."""
    _toys(toys)
    old = _cache(toys, "npy").read_bytes()
    changed = _write(toys / "TOYS/train/a/0.png", seed=77)  # as many images as before
    _toys(toys)
    _cache(toys, "npy").write_bytes(old)
    np.testing.assert_array_equal(_toys(toys).images[0], np.asarray(Image.open(changed)))


def _many(folder: Path, images: int, size: int) -> None:
    """BIG/train with two classes; few distinct files, many links to them."""
    sources = [_write(folder / f"sources/{i}.png", size, size, seed=i) for i in range(10)]
    for name in ("a", "b"):
        (folder / "BIG/train" / name).mkdir(parents=True)
        for i in range(images // 2):
            os.link(sources[i % 10], folder / f"BIG/train/{name}/{i:05d}.png")


def _build_big(folder: Path, _: int) -> bytes:
    return open_split(folder, "BIG", "train", (3, 32, 32), workers=2).images.tobytes()


def test_builders_at_the_same_time_all_get_the_right_array(tmp_path: Path) -> None:
    _many(tmp_path, 1200, 32)
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        arrays = list(pool.map(functools.partial(_build_big, tmp_path), range(4)))
    sources = b"".join(np.asarray(Image.open(tmp_path / f"sources/{i}.png")).tobytes() for i in range(10))
    assert arrays == [sources * 120] * 4
    cache = tmp_path / ".cache/BIG"
    assert sorted(file.name for file in cache.iterdir()) == ["train_3x32x32.json", "train_3x32x32.npy"]
    before = _identity(cache / "train_3x32x32.npy")
    assert _build_big(tmp_path, 0) == arrays[0]
    assert _identity(cache / "train_3x32x32.npy") == before, "what they left is a valid cache"


def _eventually(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@linux_only
def test_killed_builder_leaves_no_process_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    _many(tmp_path, 6000, 64)
    cache = tmp_path / ".cache/BIG"
    builder = multiprocessing.get_context("fork").Process(target=_build_big, args=(tmp_path, 0))
    builder.start()
    children = Path(f"/proc/{builder.pid}/task/{builder.pid}/children")
    assert _eventually(lambda: len(children.read_text().split()) == 2)
    workers = children.read_text().split()
    builder.kill()
    builder.join()
    assert workers and _eventually(lambda: not any(map(_alive, workers)))
    assert len(list(cache.iterdir())) == 1
    assert len(_build_big(tmp_path, 0)) == 6000 * 32 * 32 * 3
    assert sorted(file.name for file in cache.iterdir()) == ["train_3x32x32.json", "train_3x32x32.npy"]


@linux_only
def test_building_takes_little_memory(tmp_path: Path) -> None:
    """5,000 images of 64x64 are 61 MB; neither the process nor its workers may hold them."""
    _many(tmp_path, 5000, 64)
    _write(tmp_path / "SMALL/train/a/0.png")
    program = f"""
import re, resource, time
from pathlib import Path
from utils.image_cache import open_split
from utils.images import decode_all, list_classes
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
folder = Path({str(tmp_path)!r})
open_split(folder, "SMALL", "train", (3, 64, 64))
start = peak()
assert len(open_split(folder, "BIG", "train", (3, 64, 64), workers=2).images) == 5000
for _ in decode_all(list_classes(folder / "BIG/train"), (3, 64, 64), workers=2):
    time.sleep(0.01)  # a slow disk
print(peak() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - start)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    own, worker = (int(kilobytes) / 1024 for kilobytes in result.stdout.split())
    assert own < 25 and worker < 25, f"MB more than before the build: own {own:.0f}, worker {worker:.0f}"


PROGRAM = """
import sys
from pathlib import Path
from utils.image_cache import open_split
from utils.errors import UserError
for disk in sys.argv[1:]:
    try:
        printed = f"{len(open_split(Path(disk), 'TOYS', 'train', (3, 64, 64)).images)} images in"
    except UserError as error:
        printed = error
    caches = [path.name for path in Path(disk, ".cache").rglob("*.*")]
    print(printed, "files:", *caches, sep=" ", end="\\n")
"""


@pytest.fixture(scope="module")
def small_disks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The user's cache folder, and what opening TOYS printed on real file systems: too small or read-only.

    They are mounted for one process only, so nothing stays. The images are 8 x 64 x 64 x 3 bytes = 96 kB.
    """
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("no private mounts here (unshare --map-root-user --mount fails)")
    folder = tmp_path_factory.mktemp("disks")
    for i in range(8):
        _write(folder / f"TOYS/train/a/{i}.png")
    (folder / "program.py").write_text(PROGRAM)
    sizes = {"too small": "48k", "a header too small": "96k", "read-only": "4m"}
    lines = [
        f"mkdir '{disk}' && mount -t tmpfs -o size={size} tmpfs '{disk}' && ln -s {folder}/TOYS '{disk}/TOYS'"
        for disk, size in sizes.items()
    ]
    lines.append("mount -o remount,ro read-only")
    lines.append(" ".join([sys.executable, "program.py", *(f"'{disk}'" for disk in sizes)]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "own")}
    shell = [*UNSHARE, "sh", "-ec", "\n".join(lines)]
    result = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "own", dict(zip(sizes, result.stdout.splitlines(), strict=True))


@pytest.mark.parametrize(
    ("disk", "why"),
    [("too small", "takes 0.10 MB, of which only 0.05 are free"), ("a header too small", "No space left on device")],
)
def test_full_disk_is_an_error_that_leaves_nothing_behind(
    small_disks: tuple[Path, dict[str, str]], disk: str, why: str
) -> None:
    """The first is noticed beforehand, the second by the failing write."""
    printed = small_disks[1][disk]
    assert why in printed and "Free some" in printed and printed.endswith("files:")


def test_read_only_disk_puts_the_cache_into_the_users_folder(
    small_disks: tuple[Path, dict[str, str]],
) -> None:
    own, printed = small_disks
    assert printed["read-only"].startswith("8 images")
    names = sorted(file.name for file in (own / "fewshot/TOYS").iterdir())
    assert names == ["train_3x64x64.json", "train_3x64x64.npy"]


# --- tasks -------------------------------------------------------------------------------------------------


def test_tasks_equal_the_official_samplers() -> None:
    golden = facts("official_sampler")
    shot, query = golden["shot"], golden["target"]
    assert base_seed(0, "train") == golden["base_seed"]["train"]
    for expected in golden["tasks"]:
        split = expected["split"]
        sizes = np.full(golden["classes_per_split"][split], golden["images_per_class"])
        task = sample_task(golden["base_seed"][split] + expected["i"], sizes, golden["way"], shot, query)
        assert task.classes.tolist() == expected["classes"]
        assert task.positions[:, :shot].tolist() == expected["support_positions"]
        assert task.positions[:, shot:].tolist() == expected["target_positions"]
    assert len(golden["tasks"]) == 12


@st.composite
def _settings(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    shot, query = draw(st.integers(1, 6)), draw(st.integers(1, 16))
    sizes = draw(st.lists(st.integers(shot + query, 60), min_size=2, max_size=20))
    return np.array(sizes), draw(st.integers(2, len(sizes))), shot, query


@given(seed=st.integers(0, 2**32 - 1), setting=_settings())
def test_no_image_is_drawn_twice_and_each_belongs_to_its_class(
    seed: int, setting: tuple[np.ndarray, int, int, int]
) -> None:
    sizes, way, shot, query = setting
    task = sample_task(seed, sizes, way, shot, query)
    assert len(set(task.classes.tolist())) == way
    assert task.positions.shape == (way, shot + query)
    for k, places in zip(task.classes, task.positions, strict=True):
        assert len(set(places.tolist())) == shot + query
        assert places.min() >= 0 and places.max() < sizes[k]
    assert set(task.rotations.tolist()) <= {0, 1, 2, 3}


@given(seed=st.integers(0, 2**32 - 1), tasks=st.tuples(*[st.integers(0, 10**9)] * 3))
def test_no_two_splits_ever_use_the_same_random_stream(seed: int, tasks: tuple[int, int, int]) -> None:
    names = ("train", "val", "test")
    seeds = [base_seed(seed, name) + i for name, i in zip(names, tasks, strict=True)]
    assert len(set(seeds)) == 3 and max(seeds) < 2**32


@pytest.fixture
def episodes(cifar_fs: Path) -> Callable[..., Episodes]:
    split = open_split(cifar_fs, "CIFAR_FS", "train", (3, 32, 32))

    def make(seed: int = 0, **options: object) -> Episodes:
        return Episodes(split, 5, 2, 3, seed, **{"mean": None, "std": None, "device": CPU, **options})  # type: ignore[arg-type]

    return make


def test_a_batch_holds_the_images_of_its_tasks_and_their_labels(episodes: Callable[..., Episodes]) -> None:
    source = episodes()
    batch = source.batch(first_task=7, tasks=2)
    assert batch.x_support.shape == (2, 5, 2, 3, 32, 32) and batch.x_target.shape == (2, 5, 3, 3, 32, 32)
    assert batch.y_support.shape == (2, 5, 2) and batch.y_target.shape == (2, 5, 3)
    assert batch.y_support.dtype == batch.y_target.dtype == torch.int64
    for t in range(2):
        rows = source.indices(7 + t)
        both = torch.cat([batch.x_support[t], batch.x_target[t]], dim=1).numpy()
        expected = source.split.images[rows].transpose(0, 1, 4, 2, 3)
        np.testing.assert_array_equal(both, expected.astype(np.float32) / np.float32(255))
        classes = np.searchsorted(source.split.class_starts, rows, side="right")
        assert (classes == classes[:, :1]).all() and len(set(classes[:, 0])) == 5
    assert (batch.y_support == torch.arange(5)[:, None]).all() and (batch.y_target == torch.arange(5)[:, None]).all()


def test_support_and_query_share_no_image(episodes: Callable[..., Episodes]) -> None:
    source = episodes()
    for task in range(200):
        assert len(np.unique(source.indices(task))) == 5 * 5


def test_a_task_depends_on_seed_and_number_only(episodes: Callable[..., Episodes]) -> None:
    together, apart = episodes().batch(0, 4), episodes()
    for task in (3, 1, 0, 2):
        assert torch.equal(apart.batch(task, 1).x_target[0], together.x_target[task])
    assert not np.array_equal(episodes(seed=1).indices(0), apart.indices(0))
    assert not np.array_equal(apart.indices(1), apart.indices(0))


def test_normalisation_centres_every_channel(episodes: Callable[..., Episodes]) -> None:
    split = episodes().split
    source = episodes(mean=split.mean, std=split.std, dtype=torch.float64)
    x = source.batch(0, 20).x_target
    assert x.dtype == torch.float64
    assert x.mean(dim=(0, 1, 2, 4, 5)).abs().max() < 0.2 and (x.std(dim=(0, 1, 2, 4, 5)) - 1).abs().max() < 0.2
    plain = episodes(dtype=torch.float64).batch(0, 20).x_target
    torch.testing.assert_close(
        x * torch.tensor(split.std).view(3, 1, 1) + torch.tensor(split.mean).view(3, 1, 1),
        plain,
        atol=1e-6,
        rtol=0,
    )


@pytest.fixture(params=[1, 3], ids=["one channel", "three channels"])
def plain_and_turned(cifar_fs: Path, request: pytest.FixtureRequest) -> tuple[Episodes, Episodes]:
    """The same normalised tasks, without and with class rotations."""
    split = open_split(cifar_fs, "CIFAR_FS", "train", (request.param, 32, 32))
    plain, turned = (
        Episodes(split, 5, 2, 3, 0, split.mean, split.std, CPU, rotate_classes=rotate) for rotate in (False, True)
    )
    return plain, turned


def test_rotated_classes_are_numpys_rot90_of_the_same_tasks(plain_and_turned: tuple[Episodes, Episodes]) -> None:
    plain, turned = plain_and_turned
    upright, batch = plain.batch(7, 4), turned.batch(7, 4)
    seen = set()
    for t in range(4):
        rotations = sample_task(plain.first_seed + 7 + t, plain.split.class_sizes, 5, 2, 3).rotations.tolist()
        for k, turns in enumerate(rotations):
            for ours, theirs in ((batch.x_support, upright.x_support), (batch.x_target, upright.x_target)):
                expected = np.rot90(theirs[t, k].numpy(), turns, axes=(-2, -1))
                np.testing.assert_array_equal(ours[t, k].numpy(), expected)
        seen |= set(rotations)
    assert seen == {0, 1, 2, 3}
    assert torch.equal(batch.y_support, upright.y_support) and torch.equal(batch.y_target, upright.y_target)
    assert batch.x_support.is_contiguous() and batch.x_target.is_contiguous()


def test_a_rotated_task_depends_on_seed_and_number_only(episodes: Callable[..., Episodes]) -> None:
    together, apart = episodes(rotate_classes=True).batch(0, 4), episodes(rotate_classes=True)
    for task in (3, 1, 0, 2):
        assert torch.equal(apart.batch(task, 1).x_support[0], together.x_support[task])
        assert torch.equal(apart.batch(task, 1).x_target[0], together.x_target[task])


def test_classes_of_images_that_are_not_square_cannot_be_rotated(toys: Path) -> None:
    split = open_split(toys, "TOYS", "train", (3, 8, 6))
    with pytest.raises(UserError, match=r"TOYS/train are read 8 high and 6 wide: give --image_height"):
        Episodes(split, 2, 1, 2, 0, None, None, CPU, rotate_classes=True)
    Episodes(split, 2, 1, 2, 0, None, None, CPU).batch(0, 1)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("rotate", [False, True])
def test_on_a_gpu_a_batch_is_made_without_waiting_for_it(episodes: Callable[..., Episodes], rotate: bool) -> None:
    source = episodes(device=torch.device("cuda"), rotate_classes=rotate)
    source.batch(0, 2)
    try:
        torch.cuda.set_sync_debug_mode("error")
        source.batch(2, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("rotate", [False, True])
def test_on_a_gpu_the_batches_are_the_same_with_and_without_a_resident_split(
    episodes: Callable[..., Episodes], rotate: bool
) -> None:
    expected = episodes(rotate_classes=rotate).batch(3, 2)
    resident = episodes(device=torch.device("cuda"), rotate_classes=rotate)
    assert resident._resident is not None
    streamed = episodes(device=torch.device("cuda"), rotate_classes=rotate)
    streamed._resident = None
    for source in (resident, streamed):
        for ours, theirs in zip(source.batch(3, 2), expected, strict=True):
            assert ours.device.type == "cuda"
            torch.testing.assert_close(ours.cpu(), theirs, atol=1e-6, rtol=0)


def test_more_ways_than_classes_names_both_numbers(toys: Path) -> None:
    with pytest.raises(UserError, match=r"5 classes, but TOYS/train has 3: lower the way \(--num_classes_per_set"):
        Episodes(_toys(toys), 5, 1, 2, 0, None, None, CPU)


def test_data_sets_to_test_on_are_checked_for_every_shot_and_not_loaded_onto_a_device(
    toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_to_device", lambda *_: pytest.fail("loaded"))
    (toys / "TOYS/train").rename(toys / "TOYS/test")
    options = Options(
        dataset_dir=str(toys), dataset_name="TOYS", image_height=4, image_width=4, test_way=3, val_query=1
    )
    check_tests(dataclasses.replace(options, test_shots="1,2"))
    with pytest.raises(UserError, match=r"of TOYS/test has 3 images, but 5 shots \+ 1 targets need 6"):
        check_tests(dataclasses.replace(options, test_shots="1,5"))
    with pytest.raises(UserError, match="No data set 'ELSEWHERE'"):
        check_tests(dataclasses.replace(options, test_datasets="TOYS,ELSEWHERE"))


def test_too_few_images_in_a_class_names_it(toys: Path) -> None:
    (toys / "TOYS/train/b/2.png").unlink()
    split = _toys(toys)
    with pytest.raises(UserError) as error:
        Episodes(split, 2, 1, 2, 0, None, None, CPU)
    for part in (
        "'b'",
        "has 2 images",
        "1 shots + 2 targets",
        "--num_samples_per_class",
        "--num_target_samples",
    ):
        assert part in str(error.value)
    Episodes(split, 2, 1, 1, 0, None, None, CPU)
