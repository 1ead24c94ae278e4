"""Tables of text for the terminal."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a line for each row; the first column starts at the left, the others end at the right."""
    texts = [list(map(str, row)) for row in rows]
    first, *others = (max(map(len, column)) for column in zip(*texts, strict=True))
    return ["   ".join([text[0].ljust(first), *map(str.rjust, text[1:], others)]).rstrip() for text in texts]
