"""What came out of an experiment: a short table, its pictures, and both with the options as one page, logs/report.html.

python utils/report.py experiments/glyphs_5way_1shot/CxGrad_4conv

A run keeps the page up to date by itself; it needs no network, and can be sent as one file.
"""

import argparse
import sys
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script finds modules beside itself only; ours are found from the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils import entry
from utils.figures import Picture, draw_overview, pictures
from utils.files import replace_file, write_text
from utils.records import Result, Run, command, read_run
from utils.tables import aligned

TEMPLATES = Path(__file__).parent / "templates"


# ---------------------------------------------------------------- text


def write_report(run: Run) -> str:
    """Return the closing table of an experiment, accuracies in %."""
    training, validation = summary(run)
    lines = [f"{run.title}: {training}", validation]
    if not run.results:
        lines += ["", f"Not meta-tested yet. To do so: TEST=1 {command(run.folder)}"]
    for protocol, results in by_protocol(run.results).items():
        lines += ["", protocol, "", *aligned(table(results)), "", *checkpoints(results)]
    return "\n".join(lines)


def summary(run: Run) -> tuple[str, str]:
    """Return a sentence on the training and one on the validation."""
    best, last = run.best, run.epochs[-1]
    skipped = sum(epoch.skipped or 0 for epoch in run.epochs)
    left_out = f"{skipped:,.0f} of them left out (not finite), " if skipped else ""
    return (
        f"trained to epoch {last.epoch:.0f}, iteration {last.iterations:,.0f}, {left_out}"
        f"in {_duration(sum(epoch.seconds for epoch in run.epochs))}",
        f"Best validation accuracy {100 * best.val_accuracy:.2f} ± {100 * best.val_ci95_per_episode:.2f} % "
        f"(95 % CI per episode), epoch {best.epoch:.0f}",
    )


def by_protocol(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results that can be compared with one another, by the protocol that they share."""
    protocols = dict.fromkeys(result.protocol for result in results)
    return {protocol: [result for result in results if result.protocol == protocol] for protocol in protocols}


def table(results: Sequence[Result]) -> list[list[str]]:
    """Return three rows of headings and a row for each data set; each model has two columns."""
    models = list(dict.fromkeys(result.model for result in results))
    cells = {(result.dataset, result.model): result.cells for result in results}
    rows = [
        ["", *(text for model in models for text in (model, ""))],
        ["", *["accuracy ± 95 % CI", "± 95 % CI"] * len(models)],
        ["data set", *["per episode", "per query"] * len(models)],
    ]
    for name in dict.fromkeys(result.dataset for result in results):
        rows.append([name, *(text for model in models for text in cells.get((name, model), ("–", "–")))])
    return rows


def checkpoints(results: Sequence[Result]) -> list[str]:
    """Return which checkpoints are behind the models, a line for each."""
    return [*dict.fromkeys(result.checkpoints for result in results)]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- page


def update_report(run: Run) -> list[Picture]:
    """Write FOLDER/logs/report.html and its pictures into FOLDER/visual_outputs, and return these."""
    drawn = list(pictures(run))
    for picture in drawn:
        with replace_file(run.folder / "visual_outputs" / f"{picture.name}.png") as file:
            file.write(picture.png)
    tests = [(protocol, table(results), checkpoints(results)) for protocol, results in by_protocol(run.results).items()]
    options = {name: "default" if value is None else value for name, value in run.options.items()}
    values = {"summary": summary(run), "pictures": drawn, "tests": tests, "options": options}
    write_page(run.folder / "logs" / "report.html", "report", run.title, **values)
    return drawn


def write_page(path: Path, template: str, title: str, **values: Any) -> None:
    """Fill a template of utils/templates and write the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only where a page is made

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["base64"] = lambda data: b64encode(data).decode()
    write_text(path, environment.get_template(f"{template}.html.jinja").render(title=title, **values))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the results of an experiment and draw them.")
    parser.add_argument("folder", type=Path, help="for example experiments/glyphs_5way_1shot/CxGrad_4conv")
    run = read_run(parser.parse_args().folder)
    print(write_report(run))
    print(f"\nPicture: {draw_overview(run, run.folder / 'visual_outputs' / 'report.png')}")
    update_report(run)
    print(f"Page: {run.folder / 'logs' / 'report.html'}")


if __name__ == "__main__":
    sys.exit(entry.run(main))
