from pathlib import Path

import torch

from data import Episodes
from utils.confusion import confusion, write_confusion
from utils.image_cache import open_split
from utils.records import read_confusions
from utils.synthetic import write_dataset


def episodes(folder: Path) -> Episodes:
    write_dataset(folder / "toy", classes=4, images=5)
    split = open_split(folder, "toy", "test", (3, 8, 8), False, None)
    return Episodes(split, 2, 1, 3, 0, None, None, torch.device("cpu"))


def test_answers_are_counted_by_the_classes_own_names(tmp_path: Path) -> None:
    """Whatever the place of a class in its tasks: everything is taken for the task's first class."""
    tasks = episodes(tmp_path)
    logits = torch.tensor([1.0, 0.0]).expand(10, 2 * 3, 2)
    counts = {(row["true"], row["predicted"]): (row["answers"], row["of"]) for row in confusion(tasks, logits)}
    expected: dict[tuple[str, str], tuple[int, int]] = {}
    for task in range(10):
        first, second = (tasks.split.class_names[k] for k in tasks._draw(task).classes)
        for pair, answers in {(first, first): 3, (first, second): 0, (second, first): 3, (second, second): 0}.items():
            before = expected.get(pair, (0, 0))
            expected[pair] = before[0] + answers, before[1] + 3
    assert counts == expected and len(counts) > 8


def test_a_test_keeps_its_confusion_by_data_set_and_shot(tmp_path: Path) -> None:
    tasks = episodes(tmp_path)
    logits = torch.eye(2).repeat_interleave(3, 0).expand(10, 6, 2)
    write_confusion(tmp_path / "logs", tasks, logits)
    (pairs,) = read_confusions(tmp_path).values()
    assert [*read_confusions(tmp_path)] == ["toy 1shot"]
    assert all(pair.rate == (pair.true == pair.predicted) for pair in pairs)
