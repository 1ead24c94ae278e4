"""Published accuracies of all rows, read from experiment_scripts/published.csv.

`python -m utils.results --docs` writes them into docs/results.md, and into each script its title and accuracies.
The file has one line per number. The first number of a row and shot is the one to compare with; a line without a number
says that none is known.
"""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from utils.names import same_dataset
from utils.records import read_table

SCRIPTS = Path(__file__).resolve().parents[1] / "experiment_scripts"
TABLE = SCRIPTS / "published.csv"

# Where a number was read: how the source is introduced in a script, and the sign behind the number in docs/results.md.
MARKS = {
    "P": ("", ""),  # the text of a paper
    "R": ("", ""),  # a README by the authors of a method
    "S": ("as reported by ", "†"),  # a secondary source
    "unverified": ("unverified: ", "‡"),  # nowhere; quoted from memory
}
IN_SCRIPT = re.compile(r"(?<=^#!/usr/bin/env bash\n)# .*\n# Published accuracy.*\n(#   .*\n)*")


@dataclass(frozen=True)
class Published:
    """One line of the table: a published accuracy of one row and shot in %, or that none is known."""

    row: str  # the script's path below experiment_scripts/, without .sh
    method: str
    network: str
    dataset: str  # as papers spell it
    way: int
    shot: int
    accuracy: Decimal | None  # with the digits of the source
    ci: Decimal | None  # the ± behind it
    ci_kind: str  # what that ± is, which differs between papers
    mark: str  # a key of MARKS
    source: str
    citation: str  # the method's paper

    @property
    def has_head(self) -> bool:
        """Return whether the row is one of a head learner: trained once for all shots, tested without transduction."""
        return self.row.partition("/")[0].endswith("way")

    @property
    def number(self) -> str:
        """Return the accuracy and its ± as text, with the digits of the source."""
        return f"{self.accuracy}" if self.ci is None else f"{self.accuracy} ± {self.ci}"


def read(path: Path = TABLE) -> list[Published]:
    """Return the lines of the table in order; raise UserError with the number of a line that is damaged."""
    return read_table(path, _published)


def _published(line: Mapping[str, str]) -> Published:
    values: dict[str, Any] = {**line} | {name: int(line[name]) for name in ("way", "shot")}
    values |= {name: Decimal(line[name]) if line[name] else None for name in ("accuracy", "ci")}
    published = Published(**values)
    if published.accuracy is not None and published.mark not in MARKS:
        raise ValueError(f"the mark is none of {', '.join(MARKS)}")
    return published


def by_row(lines: Iterable[Published]) -> dict[str, list[Published]]:
    """Return the lines of each row."""
    rows: dict[str, list[Published]] = {}
    for line in lines:
        rows.setdefault(line.row, []).append(line)
    return rows


def line_of(
    lines: Iterable[Published], method: str, network: str, dataset: str, way: int, shot: int
) -> Published | None:
    """Return the first line of a row and shot; None if there is no such row."""
    for line in lines:
        same = (line.method, line.network, line.way, line.shot) == (method, network, way, shot)
        if same and same_dataset(line.dataset, dataset):
            return line
    return None


def header(lines: Sequence[Published]) -> str:
    """Return the comment lines with which the script of a row starts: its title and its published accuracies."""
    row = lines[0]
    shot = "" if row.has_head else f" {row.shot}-shot"
    numbers = [
        f"{f'{line.shot}-shot ' if row.has_head else ''}{line.number} % ({MARKS[line.mark][0]}{line.source})"
        for line in lines
        if line.accuracy is not None
    ]
    accuracies = f"Published accuracy: {'; '.join(numbers) or 'none known'}."
    wrapped = textwrap.fill(accuracies, 120, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
    return f"# {row.method}, {row.network}, {row.dataset} {row.way}-way{shot}: {row.citation}.\n{wrapped}\n"


def tables(lines: Sequence[Published]) -> str:
    """Return the Markdown tables of docs/results.md: gradient learners, then head learners."""
    gradient, head = ([line for line in lines if line.has_head == has_head] for has_head in (False, True))
    legend = (
        "† as reported by a secondary source; ‡ unverified, quoted from memory; the others: a paper or authors' README."
    )
    return f"{_table('gradient steps, transductive', gradient)}\n{_table('head, inductive', head)}\n{legend}\n"


def _table(title: str, lines: Iterable[Published]) -> str:
    """Return the first number of each method, network, data set and shot; methods without a number are left out."""
    cells: dict[tuple[str, str], dict[str, dict[int, str]]] = {}
    for line in lines:
        if line.accuracy is not None:
            cell = cells.setdefault((line.method, line.network), {}).setdefault(line.dataset, {})
            cell.setdefault(line.shot, line.number + MARKS[line.mark][1])
    datasets = list(dict.fromkeys(dataset for row in cells.values() for dataset in row))
    rows = [[f"5-way 1-/5-shot, %: {title}", *datasets], ["---"] * (len(datasets) + 1)]
    for names, row in cells.items():
        shots = [[row[dataset].get(shot, "–") for shot in (1, 5)] if dataset in row else ["–"] for dataset in datasets]
        rows.append([", ".join(names), *map(" / ".join, shots)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_headers(lines: Iterable[Published]) -> None:
    """Write into each script its title and its published accuracies; the rest of it stays."""
    for row, of_row in by_row(lines).items():
        script = SCRIPTS / f"{row}.sh"
        text = script.read_text(encoding="utf-8")
        old = IN_SCRIPT.search(text)
        if old and old[0] != header(of_row):
            script.write_text(text.replace(old[0], header(of_row)), encoding="utf-8")
