"""Folders of runs, written by hand: what an experiment would have left after three epochs."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from utils.options import Options

CSV_HEADER = (
    "epoch,iterations,train_loss,train_accuracy,val_loss,val_accuracy,val_ci95_per_episode,learning_rate,seconds"
)
ROWS = (
    "1,500,1.2,0.50,1.3,0.4812,0.0123,0.003,60.5",
    "2,1000,1,0.60,1.1,0.7346,0.0111,0.003,60.5",
    "3,1500,0.9,0.70,1.2,0.7101,0.0101,0.003,60.5",
)
HEAD: dict[str, object] = {"learner": "head", "test_shots": "1,5"}
LAYERS = ("conv0", "conv1", "linear")


def write_run(folder: Path, rows: Sequence[str] = ROWS, header: str = CSV_HEADER) -> Path:
    """An experiment of three epochs, the second the best, that is not tested yet."""
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "summary_statistics.csv").write_text("\n".join([header, *rows, ""]))
    return folder


def result(dataset: str, accuracy: float, ensemble: bool = False, **changes: object) -> dict[str, object]:
    return {
        "dataset": dataset,
        "split": "test",
        "model": "top-3 ensemble" if ensemble else "single best",
        "checkpoints": ["epoch_2", "epoch_3", "epoch_1"] if ensemble else ["epoch_2"],
        "accuracy": accuracy,
        "ci95_per_episode": 0.0131,
        "ci95_per_query": 0.0042,
        **{"episodes": 600, "way": 5, "shot": 1, "query": 15, "steps": 3, "seed": 7},
        **{"batch_norm": "transductive", "normalization": "channel", "trained_on": "glyphs"},
        **changes,
    }


def write_results(folder: Path, *results: dict[str, object]) -> None:
    (folder / "logs" / "test_summary.json").write_text(json.dumps(results))


def write_options(folder: Path, **changes: object) -> None:
    (folder / "logs" / "options.json").write_text(json.dumps(asdict(Options()) | changes))


def write_episode(
    folder: Path,
    dataset: str = "glyphs",
    way: int = 5,
    shot: int = 1,
    query: int = 6,
    channels: int = 3,
    wrong: int = 0,
) -> None:
    """A task of black images with the first `wrong` query images of class 0 taken for the last class."""
    predictions = np.repeat(np.arange(way)[:, None], query, 1)
    predictions[0, :wrong] = way - 1
    (folder / "visual_outputs").mkdir(exist_ok=True)
    np.savez_compressed(
        folder / "visual_outputs" / f"sample_episode_{dataset}.npz",
        support=np.zeros((way, shot, 28, 28, channels), np.uint8),
        query=np.zeros((way, query, 28, 28, channels), np.uint8),
        predictions=predictions,
        class_names=np.array([f"U+053{k}_ARMENIAN_CAPITAL_LETTER_NO_{k}" for k in range(way)]),
    )


def write_confusion(folder: Path, classes: int, test: str = "glyphs_1shot") -> None:
    """A test in which class 0 was taken for class 1 in 30 of 60 answers, and nothing else went wrong."""
    lines = ["true,predicted,answers,of"]
    for true in range(classes):
        for other in range(classes):
            answers = (30 if true == 0 else 60) if other == true else 30 * (true == 0 and other == 1)
            lines.append(f"class {true},class {other},{answers},60")
    (folder / "logs" / f"confusion_{test}.csv").write_text("\n".join([*lines, ""]))


def write_inside(folder: Path, head: bool = False, epochs: int = 3) -> None:
    """Diagnostics of CxGrad, or of a head with DropBlock."""
    records = []
    for epoch in range(1, epochs + 1):
        steps = {"mean": [0.3, 0.5, 0.1 * epoch + 0.4], "std": [0.1, 0.1, 0.1]}
        series = {"accuracy": steps}
        for place, name in enumerate(LAYERS, 1):
            series[f"gradient_norm/{name}"] = {"mean": [place, place / 2, place / 3], "std": [0.1] * 3}
            series[f"gradient_norm_unscaled/{name}"] = {"mean": [10.0**place] * 3, "std": [0.1] * 3}
            series[f"gamma/{name}"] = {"mean": [1.0 + place] * 3, "std": [0.2] * 3}
        record: dict[str, object] = {"epoch": epoch, "iterations": 500 * epoch, "tasks": 8, "peak_memory_gib": 0.5}
        if head:
            record |= {"dropblock_keep": 1 - 0.02 * epoch}
            series = {"residual": {"mean": [1e-11 * epoch], "std": [1e-12]}}
        records.append(record | {"series": series})
    (folder / "logs" / "diagnostics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
