"""MetaOptNet's training augmentation: torchvision image by image, as the official loader does, against ours.

python benchmarks/augmentation.py                      one thread of this machine's CPU
python benchmarks/augmentation.py --device cuda

Both start from the 8-bit images of 8 episodes: 55 each at 32x32 (5-shot), 105 at 84x84 (15-shot), 5-way, 6 queries.
"augmented": crop, jitter and flip, to 8 bits. "normalised": the same up to the batch of normalised floats that the
network gets. The two ways take turns within one process; drawing the random numbers counts in both.
Prints one table and writes it to benchmarks/results/.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from augmentation import JITTER, augment, draw  # noqa: E402
from benchmarks.iteration import machine  # noqa: E402
from utils.devices import keep_freed_memory  # noqa: E402
from utils.tables import aligned  # noqa: E402

TASKS = 8
CASES = ((32, 4, 55), (84, 8, 105))  # pixels, padding, images of a task
MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)  # of CIFAR-FS; any will do


def torchvision_way(images: np.ndarray, padding: int) -> dict[str, Callable[[], object]]:
    """Images (n, H, W, 3) uint8."""
    chance = [
        transforms.RandomCrop(images.shape[1], padding=padding),
        transforms.ColorJitter(JITTER, JITTER, JITTER),
        transforms.RandomHorizontalFlip(),
        np.array,
    ]
    change = transforms.Compose(chance)
    whole = transforms.Compose([*chance, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return {
        "augmented": lambda: [change(Image.fromarray(image)) for image in images],
        "normalised": lambda: torch.stack([whole(Image.fromarray(image)) for image in images]),
    }


def our_way(images: np.ndarray, padding: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Images (n, H, W, 3) uint8, which lie on the device."""
    pixels = torch.from_numpy(images).to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def send(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    def augmented() -> torch.Tensor:
        return augment(pixels, draw(range(TASKS), len(images) // TASKS, padding), padding, send)

    return {"augmented": augmented, "normalised": lambda: augmented().div_(255).sub_(mean).div_(std)}


def measure(size: int, padding: int, images_per_task: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two rows of the table."""
    device = torch.device(options.device)
    images = textures(TASKS * images_per_task, size)
    official, ours = torchvision_way(images, padding), our_way(images, padding, device)
    rows = []
    for result in official:
        times = np.array(
            [[seconds(way[result], device) for way in (official, ours)] for _ in range(options.rounds + 1)][1:]
        )
        ratios = np.sort(times[:, 0] / times[:, 1])
        rows.append(
            {
                "pixels": size,
                "images": len(images),
                "result": result,
                "torchvision_ms": round(1000 * statistics.median(times[:, 0]), 2),
                "ours_ms": round(1000 * statistics.median(times[:, 1]), 2),
                "torchvision_over_ours": [round(float(r), 1) for r in (ratios[0], np.median(ratios), ratios[-1])],
            }
        )
    return rows


def textures(images: int, size: int) -> np.ndarray:
    """(images, size, size, 3) uint8: smooth blobs with some noise. What is in them changes no time here."""
    random = np.random.default_rng(0)
    blobs = torch.from_numpy(random.random((images, 3, 6, 6), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(blobs, size=(size, size), mode="bicubic").permute(0, 2, 3, 1).numpy()
    return (255 * smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU [%(default)s]")
    parser.add_argument("--rounds", type=int, default=15, help="[%(default)s]")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in training
    where = machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    rows = [row for case in CASES for row in measure(*case, options)]
    table = [["result", "pixels", "images", "torchvision ms", "ours ms", "torchvision/ours"]]
    for row in rows:
        lowest, median, highest = row["torchvision_over_ours"]
        cells = (row[name] for name in ("result", "pixels", "images", "torchvision_ms", "ours_ms"))
        table.append([*cells, f"{median} ({lowest} .. {highest})"])
    print(*aligned(table), sep="\n")
    kind = "cpu" if options.device == "cpu" else where["device"].replace(" ", "_")
    file = ROOT / "benchmarks" / "results" / f"augmentation_{kind}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"machine": where, "settings": vars(options), "rows": rows}, indent=2) + "\n")
    print(f"written to {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
