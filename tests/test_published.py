"""The table of published numbers: what it says is what the scripts say."""

import shutil
from decimal import Decimal
from pathlib import Path

import pytest

from utils import published
from utils.errors import UserError
from utils.published import (
    IN_SCRIPT,
    MARKS,
    SCRIPTS,
    TABLE,
    Published,
    by_row,
    header,
    read,
    tables,
)

COLUMNS = TABLE.read_text(encoding="utf-8").partition("\n")[0]
LINE = "toy_5way_1shot/MAML_4conv,MAML,4-CONV,toy,5,1,48.70,1.84,95 % CI over tasks,{mark},a page,A. Author"


def one_line(tmp_path: Path, line: str) -> list[Published]:
    path = tmp_path / "published.csv"
    path.write_text(f"{COLUMNS}\n{line}\n", encoding="utf-8")
    return read(path)


def test_table_has_the_rows_that_have_scripts() -> None:
    scripts = {f"{path.parent.name}/{path.stem}" for path in SCRIPTS.glob("*/*.sh")}
    assert set(by_row(read())) == scripts


@pytest.mark.parametrize("row", by_row(read()))
def test_script_states_what_the_table_says(row: str) -> None:
    match = IN_SCRIPT.search((SCRIPTS / f"{row}.sh").read_text(encoding="utf-8"))
    assert match is not None
    assert match[0] == header(by_row(read())[row])


def test_every_number_has_a_source() -> None:
    assert [line for line in read() if line.accuracy is not None and not (line.source and line.citation)] == []
    assert [line for line in read() if line.ci is not None and not line.ci_kind] == []


@pytest.mark.parametrize("mark", MARKS)
def test_numbers_keep_their_digits_and_doubtful_ones_are_marked(mark: str, tmp_path: Path) -> None:
    lines = one_line(tmp_path, LINE.format(mark=mark))
    assert (lines[0].accuracy, lines[0].ci) == (Decimal("48.7"), Decimal("1.84"))
    introduction, sign = MARKS[mark]
    assert f"Published accuracy: 48.70 ± 1.84 % ({introduction}a page)." in header(lines)
    assert f"| MAML, 4-CONV | 48.70 ± 1.84{sign} / – |" in tables(lines)
    assert bool(sign) == (mark in ("S", "unverified"))


@pytest.mark.parametrize(
    "line",
    [LINE.format(mark="Q"), LINE.format(mark="P").replace("48.70", "49 %"), LINE.format(mark="P") + ",more", "a,b"],
)
def test_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"published\.csv, line 2 "):
        one_line(tmp_path, line)


def test_headers_are_renewed_and_the_rest_of_a_script_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "glyphs_5way_1shot/CxGrad_4conv"
    lines = one_line(tmp_path, LINE.format(mark="S").replace("toy_5way_1shot/MAML_4conv", name))
    script = tmp_path / f"{name}.sh"
    script.parent.mkdir()
    shutil.copy(SCRIPTS / f"{name}.sh", script)
    monkeypatch.setattr(published, "SCRIPTS", tmp_path)
    published.write_headers(lines)
    before, after = ((folder / f"{name}.sh").read_text(encoding="utf-8") for folder in (SCRIPTS, tmp_path))
    assert "\n# Published accuracy: 48.70 ± 1.84 % (as reported by a page).\n# " in after
    assert IN_SCRIPT.sub("", before) == IN_SCRIPT.sub("", after)
