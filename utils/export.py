"""Write a trained model into a folder to hand on: weights, options, results and a model card. Nothing is uploaded.

python -m utils.export experiments/glyphs_5way_1shot/CxGrad_4conv my_model

The model is the best epoch by validation. `test.py --load`, `predict.py --load` and `Predictor.load` take the folder:

model.safetensors    the weights; reading them runs no code
options.json         the options of the training, less paths of this machine, and the normalisation of the images
test_summary.json    the results of meta-tests of this epoch
README.md            a card as on the Hugging Face Hub, made of the above
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils import checkpoints, entry, published
from utils.checkpoints import OPTIONS, PARTS, WEIGHTS
from utils.errors import UserError
from utils.files import parsed_json, replace_file, replace_folder, write_text
from utils.options import Options, all_defaults
from utils.progress import set_up_logging
from utils.records import read_tests
from utils.results import methods_of

log = logging.getLogger(__name__)

RESULTS, CARD = "test_summary.json", "README.md"
FILES = {WEIGHTS, OPTIONS, RESULTS, CARD}
BEST = ("saved_models/best", "saved_models/best_model.pth", "best", "best_model.pth")  # in an experiment's folder
OF_THIS_MACHINE = ("dataset_dir", "experiments_dir", "save_path", "name_of_args_json_file", "gpu", "tracker")


def export(experiment: Path, out: Path) -> None:
    """Write the best epoch of an experiment to the folder `out`, whole or not at all.

    Raises UserError where there is no checkpoint, or where `out` is there and is not an export as it was written.
    """
    shown, out = out.name if out.is_absolute() else out.as_posix(), out.resolve()
    check_place(out)
    state = checkpoints.load(best_of(experiment))
    if "options" not in state:
        raise UserError(f"{best_of(experiment)} does not say how it was trained, so it cannot be exported")
    results = results_of(experiment, state)
    weights = checkpoints.to_safetensors(state)
    card = card_of(state, results, shown)
    described = describe(state) | {
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "card_sha256": hashlib.sha256(card.encode()).hexdigest(),
    }
    with replace_folder(out) as folder:
        with replace_file(folder / WEIGHTS) as file:
            file.write(weights)
        write_text(folder / OPTIONS, json.dumps(described, indent=2))
        write_text(folder / RESULTS, json.dumps(results, indent=2))
        write_text(folder / CARD, card)


def check_place(out: Path) -> None:
    """Raise UserError if there is anything at `out` but an empty folder or an export that nobody has changed."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    cure = "move it away or choose another folder"
    try:
        described = parsed_json((out / OPTIONS).read_bytes())
        card, weights = described["card_sha256"], described["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} is there and is no export of this program; {cure}") from error
    if others := sorted(path.name for path in out.iterdir() if path.name not in FILES):
        raise UserError(f"{out} holds {', '.join(others[:3])} beside an export; {cure}")
    for name, written in ((CARD, card), (WEIGHTS, weights)):
        if not (out / name).is_file() or hashlib.sha256((out / name).read_bytes()).hexdigest() != written:
            raise UserError(f"{out / name} is not as it was exported; {cure}")


def best_of(experiment: Path) -> Path:
    """Return the checkpoint of the best epoch; UserError where there is none."""
    if not experiment.is_dir():
        raise UserError(
            f"there is no experiment {experiment}; name a folder such as experiments/DATASET_5way_1shot/NAME"
        )
    for name in BEST:
        if (experiment / name).is_file():
            return experiment / name
    raise UserError(f"{experiment} has no checkpoint of a finished epoch: there is no {experiment / BEST[0]}")


def results_of(experiment: Path, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results of the epoch in `state` as trained, and say what is left out; UserError for a damaged file."""
    file = experiment / "logs" / RESULTS
    if not file.is_file():
        log.warning("the experiment was not meta-tested, and the card says so; test it first to hand on its accuracy")
        return []
    rows, epoch = read_tests(file), f"epoch_{state['history'][-1]['epoch']}"
    single = [row for row in rows if not row["model"].startswith("top-") and not row.get("changed")]
    own = [row for row in single if [name.removesuffix(".pth") for name in row["checkpoints"]] == [epoch]]
    if left_out := len(rows) - len(own):
        log.info(
            "left out: %d results of ensembles, of checkpoints other than %s, or of changed options", left_out, epoch
        )
    return own


def describe(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `utils.checkpoints.load_exported` reads beside the weights, and how far the training had come."""
    options = Options.from_mapping(state["options"], saved=True)
    usual = all_defaults(options.learner)
    here = {name: usual[name] for name in OF_THIS_MACHINE}
    return {
        "options": dataclasses.asdict(dataclasses.replace(options, **here)),
        "normalization": state["normalization"],
        "iterations_done": state["iterations_done"],
        "epoch": state["history"][-1]["epoch"],
        "val_accuracy": state["history"][-1]["val_accuracy"],
    }


# --- the card -------------------------------------------------------------------------------------------------------


def card_of(state: Mapping[str, Any], results: Sequence[Mapping[str, Any]], path: str) -> str:
    """Return the model card of a model that lies at `path`."""
    options, name = Options.from_mapping(state["options"], saved=True), Path(path).name
    methods = methods_of(options)
    citations = {line.method: line.citation for line in published.read()}
    tensors = [tensor for part in PARTS for tensor in state.get(part, {}).values()]
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=folder, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.get_template("model_card.md.jinja").render(
        name=name,
        path=path,
        options=options,
        method=" + ".join(methods),
        citation="; ".join(citations[method] for method in methods if method in citations),
        tags=["few-shot-learning", "meta-learning", *methods],
        model_index=[{"name": name, "results": list(map(metric, results))}] if results else [],
        results=results,
        weights=sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()),
        iterations=state["iterations_done"],
        epoch=state["history"][-1]["epoch"],
        val_accuracy=state["history"][-1]["val_accuracy"],
    )


def metric(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result as the Hub's model index has it."""
    task = f"{result['way']}-way {result['shot']}-shot image classification"
    return {
        "task": {"type": "image-classification", "name": task},
        "dataset": {"type": result["dataset"], "name": result["dataset"], "split": result["split"]},
        "metrics": [{"type": "accuracy", "value": result["accuracy"], "name": f"accuracy, {task}"}],
    }


def main(argv: Sequence[str] | None = None) -> None:
    set_up_logging()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="folder of a training's results")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; an earlier export there is replaced")
    asked = parser.parse_args(argv)
    export(asked.experiment, asked.out)
    log.info("exported to %s: %s", asked.out, ", ".join(sorted(FILES)))


if __name__ == "__main__":
    sys.exit(entry.run(main))
