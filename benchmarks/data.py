"""Episodes from the warm cache against opening each JPEG anew, and what it takes to build the cache.

python benchmarks/data.py                a minute or two, 300 MB of temporary files

Episodes are 5-way 5-shot with 15 queries at 84x84. The official way opens, decodes and resizes the 100 files of each;
ours is `data.Episodes.batch`. They take turns in one process, on the same tasks, with all files in the system's memory
(which favours the official way). The images are synthetic textures: as JPEGs of 500x375 pixels, quality 90 (some
80 kB), and as JPEGs that have 84x84 already. The cache is built with one process for each core, in a process of its own
whose peak memory is measured (Linux); builds from many small images show whether it grows with their number.
Prints three tables and writes them to benchmarks/results/.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.iteration import machine  # noqa: E402
from data import Episodes  # noqa: E402
from utils.devices import keep_freed_memory  # noqa: E402
from utils.image_cache import open_split  # noqa: E402
from utils.images import list_classes  # noqa: E402
from utils.tables import aligned  # noqa: E402

SHAPE = (3, 84, 84)
WAY, SHOT, QUERY = 5, 5, 15
SOURCES = {"500x375": (500, 375, 40), "84x84": (84, 84, 40)}  # width, height, images in each of 20 classes
SMALL = {"10000 of 16x16": (16, 16, 500), "40000 of 16x16": (16, 16, 2000)}  # to see the memory grow, if it did
TIERED = 780_000  # images of tieredImageNet


def write_jpegs(folder: Path, width: int, height: int, each: int) -> float:
    """20 classes of `each` textures; returns the mean kB of a file."""
    random = np.random.default_rng(0)
    size = 0
    for k in range(20):
        (folder / f"class{k:02}").mkdir(parents=True)
        texture = _texture(random, 2 * height, 2 * width)
        for i in range(each):
            top, left = random.integers(0, (height, width))
            file = folder / f"class{k:02}/{i:05}.jpg"
            Image.fromarray(texture[top : top + height, left : left + width]).save(file, quality=90)
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


def official_episode(files: list[Path], mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(images, C, H, W), normalised: each file opened, decoded and resized."""
    arrays = []
    for file in files:
        image = Image.open(file).convert("RGB").resize(SHAPE[2:0:-1], Image.Resampling.LANCZOS)
        arrays.append(np.asarray(image, np.float32) / 255)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).sub(mean).div(std)


def sample(folder: Path, name: str, episodes: int) -> dict[str, Any]:
    """Milliseconds of an episode in both ways."""
    split = open_split(folder, name, "train", SHAPE)
    listing = list_classes(folder / name / "train")
    source = Episodes(split, WAY, SHOT, QUERY, 0, split.mean, split.std, torch.device("cpu"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (split.mean, split.std))
    seconds = []
    for task in range(-1, episodes):  # the first one warms up and compares
        start = time.perf_counter()
        files = [listing.root / listing.files[row] for row in source.indices(max(task, 0)).ravel()]
        official = official_episode(files, mean, std)
        middle = time.perf_counter()
        batch = source.batch(max(task, 0), 1)
        seconds.append((middle - start, time.perf_counter() - middle))
        if task < 0:
            ours = torch.cat([batch.x_support, batch.x_target], dim=2).view_as(official)
            torch.testing.assert_close(ours, official, atol=1e-5, rtol=0)
    ratios = sorted(theirs / own for theirs, own in seconds[1:])
    official_ms, our_ms = (1000 * statistics.median(column) for column in zip(*seconds[1:], strict=True))
    return {
        "files": name,
        "official_ms": round(official_ms, 2),
        "ours_ms": round(our_ms, 3),
        "official_over_ours": [round(r, 1) for r in (ratios[0], statistics.median(ratios), ratios[-1])],
    }


def build(folder: Path, name: str, size: int) -> dict[str, float]:
    """Rate of building the cache in this process, and the most MB that it and the largest of its workers held."""
    start = time.perf_counter()
    images = len(open_split(folder, name, "train", (3, size, size)).images)
    seconds = time.perf_counter() - start
    own = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])  # kB
    return {
        "images": images,
        "images_per_second": round(images / seconds, 1),
        "projected_minutes": round(TIERED * seconds / images / 60, 1),
        "process_mb": round(own / 1024, 1),
        "worker_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1),
    }


def build_apart(folder: Path, name: str, size: int) -> dict[str, Any]:
    """`build` in a fresh process."""
    child = [sys.executable, __file__, "--child", f"{folder},{name},{size}"]
    return {"files": name, **json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=25, help="of each way [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for episodes [%(default)s]")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, name, size = options.child.split(",")
        print(json.dumps(build(Path(folder), name, int(size))))
        return
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in training
    where = machine("cpu")
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    with tempfile.TemporaryDirectory() as temporary:
        tables = measure(Path(temporary), options.episodes)
    settings = {name: value for name, value in vars(options).items() if name != "child"}
    file = ROOT / "benchmarks" / "results" / "data_cpu.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"machine": where, "settings": settings, **tables}, indent=2) + "\n")
    print(f"written to {file.relative_to(ROOT)}")


def measure(folder: Path, episodes: int) -> dict[str, list[dict[str, Any]]]:
    """Measure everything, print the tables and return them."""
    tables: dict[str, list[dict[str, Any]]] = {"builds": [], "episodes": [], "memory": []}
    for name, layout in SOURCES.items():
        kilobytes = write_jpegs(folder / name / "train", *layout)
        tables["builds"].append(build_apart(folder, name, 84) | {"file_kb": round(kilobytes, 1)})
    for name, layout in SMALL.items():
        write_jpegs(folder / name / "train", *layout)
        tables["memory"].append(build_apart(folder, name, 16))
    tables["episodes"] = [sample(folder, name, episodes) for name in SOURCES]
    print(f"building caches; projected_minutes are for {TIERED:,} images")
    for name in ("builds", "memory"):
        print(*aligned([list(tables[name][0]), *(list(row.values()) for row in tables[name])]), sep="\n")
    print("episodes from the warm cache; lowest, median and highest ratio")
    print(*aligned([list(tables["episodes"][0]), *(list(row.values()) for row in tables["episodes"])]), sep="\n")
    return tables


if __name__ == "__main__":
    main()
