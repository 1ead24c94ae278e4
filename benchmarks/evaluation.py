"""Tasks per second of meta-testing: five inner steps on the support images, then the logits of the query images.

python benchmarks/evaluation.py                     the published 84x84 rows, 1- and 5-shot, on this machine
python benchmarks/evaluation.py --size 32

"ours" is `run_validation_iter`; "naive" is `tests.naive_reference`, a loop over tasks by torch's own operations that
keeps no graph between inner steps. Both first have to give the same loss in float64. They take turns in processes of
their own. Prints one table and writes it to benchmarks/results/.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import Row, compare, finish, run_child, start, timed_alone  # noqa: E402
from benchmarks.iteration import BATCH_SIZES, build, gradient_command_line, parity_case  # noqa: E402
from benchmarks.peers import STEPS, Batch, check_parity  # noqa: E402
from few_shot_learning_system import MAMLFewShotClassifier  # noqa: E402
from tests.naive_reference import naive_loss  # noqa: E402


def evaluate(variant: str, method: str, model: MAMLFewShotClassifier, batch: Batch) -> float:
    """Return the mean query loss of a batch of tasks."""
    if variant == "ours":
        return float(model.run_validation_iter(batch)[0]["loss"])
    return float(naive_loss(model, batch, STEPS, method == "CxGrad", second_order=False))


def measure(options: argparse.Namespace, variant: str, method: str, shot: int) -> Row:
    """Compare the loss of `variant` with the naive loop's, then time it, in this process."""
    small = parity_case(method, shot, options)
    expected = {"loss": evaluate("naive", method, *small), "gradients": {}}
    check_parity(evaluate(variant, method, *small), {}, expected)
    model, batch = build(method, shot, options, options.size)
    return timed_alone(lambda: evaluate(variant, method, model, batch), options.device, repetitions=3)


def main() -> None:
    options = start(gradient_command_line(__doc__), measure)
    table: list[Row] = []
    for method in options.methods:
        for shot in options.shots:
            variants = {name: partial(run_child, name, method, shot) for name in ("ours", "naive")}
            case = {"method": method, "shot": shot}
            table += compare(case, variants, options.rounds, count="tasks", of=BATCH_SIZES[shot])
    question = f"Meta-testing, {options.size}x{options.size}, {STEPS} steps, float32"
    finish("evaluation", options, {question: table}, str(options.size))


if __name__ == "__main__":
    main()
