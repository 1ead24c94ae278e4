"""A picture of predictions: for each class its support images, and the query images that were taken for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from preprocess.contact_sheet import FAINT, GAP, HEADING, INK, PAPER, SIDE, font, paste

COLUMNS, SHOWN = 10, 100  # images in a row; query images of a class, at most
NARROWEST = 6  # columns that headings have room in
LABEL, CAPTION = 64, 30  # pixels: width of the rows' names; height of a query's name and probability
LETTERS = 12  # of a file's name


class Answered(NamedTuple):
    """A class and the answers for it."""

    name: str
    support: Sequence[Path]
    queries: Sequence[tuple[Path, float]]  # with the probability of this class


def prediction_sheet(classes: Sequence[Answered]) -> Image.Image:
    """Return the sheet, query images in the order of their probability; of many the most and the least certain."""
    shown = [one._replace(support=one.support[:COLUMNS], queries=ends(one.queries)) for one in classes]
    height = sum(HEADING + SIDE + GAP + rows(one) * (SIDE + CAPTION) for one in shown)
    used = max(NARROWEST, *(min(COLUMNS, max(len(one.support), len(one.queries))) for one in shown))
    sheet = Image.new("RGB", (LABEL + used * (SIDE + GAP), height + GAP), PAPER)
    draw, large, small = ImageDraw.Draw(sheet), font(13), font(10)
    top = 0
    for one, all_of in zip(shown, classes, strict=True):
        count = len(all_of.queries)
        left_out = f", {len(one.queries)} shown" if len(one.queries) < count else ""
        heading = f"{shortened(one.name, 60)}: {count:,} query image{'s' * (count != 1)}{left_out}"
        draw.text((GAP, top + 6), heading, fill=INK, font=large)
        top += HEADING
        draw.text((GAP, top + SIDE / 2), "support", fill=FAINT, font=small, anchor="lm")
        for column, path in enumerate(one.support):
            paste(sheet, path, LABEL + column * (SIDE + GAP), top)
        top += SIDE + GAP
        for i, (path, probability) in enumerate(one.queries):
            left, row_top = LABEL + i % COLUMNS * (SIDE + GAP), top + i // COLUMNS * (SIDE + CAPTION)
            paste(sheet, path, left, row_top)
            caption = f"{shortened(path.name, LETTERS)}\n{probability:.0%}"
            draw.text(
                (left + SIDE / 2, row_top + SIDE + 1), caption, fill=FAINT, font=small, anchor="ma", align="center"
            )
        if one.queries:
            draw.text((GAP, top + SIDE / 2), "query", fill=FAINT, font=small, anchor="lm")
        top += rows(one) * (SIDE + CAPTION)
    return sheet


def rows(one: Answered) -> int:
    return -(-len(one.queries) // COLUMNS)


def ends(queries: Sequence[tuple[Path, float]]) -> list[tuple[Path, float]]:
    """Return queries in falling order of probability; of more than SHOWN the first and the last half."""
    ordered = sorted(queries, key=lambda query: -query[1])
    return ordered if len(ordered) <= SHOWN else ordered[: SHOWN // 2] + ordered[-SHOWN // 2 :]


def shortened(text: str, letters: int) -> str:
    """Return a name that can be drawn in one line: its end may be missing, and what is no Unicode."""
    plain = " ".join(text.encode(errors="replace").decode().split())
    return plain if len(plain) <= letters else plain[: letters - 1] + "…"
