"""Episodes from the warm cache against opening each JPEG anew, and what it takes to build the cache.

python benchmarks/data.py                some three minutes, 1 GB of temporary files

Episodes are 5-way 5-shot with 15 queries. The official way opens, decodes and resizes the 100 files of each; ours is
`data.Episodes.batch`. They take turns in one process, on the same tasks, with all files in the system's memory (which
favours the official way). Made-up images are textures: as JPEGs of 500x375 pixels, quality 90 (some 80 kB), and as
JPEGs that have 84x84 already; real ones come from the archives in --archives, where they are. The cache is built with
one process for each core, in a process of its own whose peak memory is measured (Linux); builds from many small images
show whether it grows with their number. Prints two tables and writes them to benchmarks/results/.
"""

import argparse
import re
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import Row, attempt, command_line, compare, finish, run_child, start, timed  # noqa: E402
from data import Episodes  # noqa: E402
from preprocess.preprocess import prepare  # noqa: E402
from utils.image_cache import open_split  # noqa: E402
from utils.images import list_classes  # noqa: E402

WAY, SHOT, QUERY = 5, 5, 15
SOURCES = {  # width, height, pixels of the cache, images in each of 20 classes
    "500x375": (500, 375, 84, 40),
    "84x84": (84, 84, 84, 40),
    "10000 of 16x16": (16, 16, 16, 500),  # the last two: to see the memory grow, if it did
    "40000 of 16x16": (16, 16, 16, 2000),
}
ARCHIVES = {"CIFAR_FS": ("cifar100.zip", 32), "tiny_tiered_64": ("tiny_tiered_64.zip", 64)}
TIERED = 780_000  # images of tieredImageNet


def write_jpegs(folder: Path, width: int, height: int, each: int) -> float:
    """20 classes of `each` parts of a texture; returns the mean kB of a file."""
    random = np.random.default_rng(0)
    texture = _texture(random, 2 * height, 2 * width)
    size = 0
    for k in range(20):
        (folder / f"class{k:02}").mkdir(parents=True)
        for i in range(each):
            top, left = random.integers(0, (height, width))
            file = folder / f"class{k:02}/{i:05}.jpg"
            part = np.ascontiguousarray(texture[top : top + height, left : left + width])  # PIL copies it far slower
            Image.fromarray(part).save(file, quality=90)
            size += file.stat().st_size
    return size / (20 * each) / 1000


def _texture(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 with detail of every scale, stronger the coarser, as in photographs."""
    total = np.zeros((height, width, 3))
    for cells in (3, 6, 12, 25, 50, 100, 200, 400):
        for c in range(3):
            coarse = Image.fromarray(random.normal(0, 1, (cells, cells)).astype(np.float32))
            total[:, :, c] += np.asarray(coarse.resize((width, height))) * 90 / cells**0.25
    return (128 + total + random.normal(0, 4, total.shape)).clip(0, 255).astype(np.uint8)


def official_episode(files: list[Path], pixels: int, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(images, C, H, W), normalised: each file opened, decoded and resized."""
    arrays = []
    for file in files:
        image = Image.open(file).convert("RGB").resize((pixels, pixels), Image.Resampling.LANCZOS)
        arrays.append(np.asarray(image, np.float32) / 255)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).sub(mean).div(std)


def sample(folder: Path, name: str, pixels: int, episodes: int) -> list[Row]:
    """Return a row for each of the two ways to make an episode, in turns on the same tasks."""
    shape = (3, pixels, pixels)
    split = open_split(folder, name, "train", shape)
    listing = list_classes(folder / name / "train")
    source = Episodes(split, WAY, SHOT, QUERY, 0, split.mean, split.std, torch.device("cpu"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (split.mean, split.std))

    def official(task: int) -> torch.Tensor:
        files = [listing.root / listing.files[row] for row in source.indices(task).ravel()]
        return official_episode(files, pixels, mean, std)

    batch = source.batch(0, 1)
    ours = torch.cat([batch.x_support, batch.x_target], dim=2).view(-1, *shape)
    torch.testing.assert_close(ours, official(0), atol=1e-5, rtol=0)
    tasks = {"ours": iter(range(episodes)), "official": iter(range(episodes))}
    ways = {"ours": lambda: source.batch(next(tasks["ours"]), 1), "official": lambda: official(next(tasks["official"]))}
    variants = {variant: partial(timed, way, "cpu", warm_up=0) for variant, way in ways.items()}
    return compare({"files": name, "pixels": pixels}, variants, episodes)


def build(_: argparse.Namespace, folder: str, name: str, pixels: int) -> Row:
    """Rate of building the cache in this process, and the most MB that it and the largest of its workers held."""
    begin = time.perf_counter()
    images = len(open_split(Path(folder), name, "train", (3, pixels, pixels)).images)
    seconds = time.perf_counter() - begin
    own = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])  # kB
    return {
        "images": images,
        "images_per_second": images / seconds,
        "projected_minutes": TIERED * seconds / images / 60,
        "process_mb": own / 1024,
        "worker_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def built(folder: Path, name: str, pixels: int, extra: Row) -> list[Row]:
    """Return a row of `build` in a fresh process, with what is known beside it."""
    case = {"files": name, "pixels": pixels, **extra}
    return attempt(lambda: [case | run_child(str(folder), name, pixels)], case)


def main() -> None:
    parser = command_line(__doc__, threads=1)
    parser.add_argument("--episodes", type=int, default=25, help="of each way [%(default)s]")
    parser.add_argument("--archives", type=Path, default=ROOT.parent / "shared" / "data", help="[../shared/data]")
    parser.add_argument("--images", type=int, help="of each class that is made up; default: as many as said above")
    options = start(parser, build)
    archives = vars(options).pop("archives")  # where they lie is no setting for the record
    builds: list[Row] = []
    episodes: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, (width, height, pixels, each) in SOURCES.items():
            kilobytes = write_jpegs(folder / name / "train", width, height, options.images or each)
            builds += built(folder, name, pixels, {"file_kb": kilobytes})
            if pixels > 16:
                episodes += attempt(partial(sample, folder, name, pixels, options.episodes), {"files": name})
        for name, (archive, pixels) in ARCHIVES.items():
            if (archives / archive).exists():
                begin = time.perf_counter()
                (folder / archive).symlink_to((archives / archive).resolve())
                prepare(name, folder)
                builds += built(folder, name, pixels, {"archive_seconds": time.perf_counter() - begin})
                episodes += attempt(partial(sample, folder, name, pixels, options.episodes), {"files": name})
    finish("data", options, {
        f"Building the cache; projected minutes are for {TIERED:,} images": builds,
        f"Episodes from the warm cache, {WAY}-way {SHOT}-shot, {QUERY} queries": episodes,
    })  # fmt: skip


if __name__ == "__main__":
    main()
