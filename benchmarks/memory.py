"""Peak memory of one second-order iteration of ResNet-12, 5-way 5-shot at 84x84, with and without stored inner steps.

python benchmarks/memory.py                     on this machine; the variant that stores all needs about 20 GiB
python benchmarks/memory.py --device cuda

One task per pass, 15 targets, 5 inner steps, widths 64-128-256-512; each variant in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.iteration import machine  # noqa: E402
from few_shot_learning_system import MAMLFewShotClassifier  # noqa: E402
from utils.devices import peak_memory_gib  # noqa: E402


def measure(checkpointed: bool, device: torch.device, size: int) -> dict[str, float]:
    """Peak GiB, seconds and loss of one training iteration on one task."""
    options = SimpleNamespace(backbone="ResNet-12", num_samples_per_class=5, batch_size=1, tasks_per_pass=1)
    options.checkpoint_inner_steps = checkpointed
    model = MAMLFewShotClassifier((1, 3, size, size), device, options)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 5, n, 3, size, size, generator=generator).to(device) for n in (5, 15)]
    labels = [torch.arange(5, device=device).view(1, 5, 1).repeat(1, 1, n) for n in (5, 15)]
    start = time.perf_counter()
    losses, _ = model.run_train_iter((*images, *labels), 0)
    loss = losses["loss"].item()
    return {"peak_gib": peak_memory_gib(device), "seconds": time.perf_counter() - start, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    parser.add_argument("--size", type=int, default=84, help="pixels [%(default)s]")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child == "recomputed", torch.device(options.device), options.size)))
        return
    where = machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    rows = {}
    for variant in ("recomputed", "stored"):
        child = [sys.executable, __file__, *sys.argv[1:], "--child", variant]
        rows[variant] = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
        print(f"inner steps {variant:10}  peak {peak(rows[variant])}, {rows[variant]['seconds']:.1f} s")
    kind = "cpu" if options.device == "cpu" else where["device"].replace(" ", "_")
    file = ROOT / "benchmarks" / "results" / f"memory_resnet12_{options.size}_{kind}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"machine": where, "rows": rows}, indent=2) + "\n")
    print(f"written to {file.relative_to(ROOT)}")


def peak(row: dict[str, float]) -> str:
    return f"{row['peak_gib']:.2f} GiB, loss {row['loss']:.6f}"


if __name__ == "__main__":
    main()
