"""The table of published numbers: what it says is what the scripts and docs/results.md say."""

import shutil
from decimal import Decimal
from pathlib import Path

import pytest

from utils import published
from utils.errors import UserError
from utils.published import (
    IN_RESULTS,
    IN_SCRIPT,
    MARKS,
    RESULTS,
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


def test_readme_states_what_the_table_says() -> None:
    match = IN_RESULTS.search(RESULTS.read_text(encoding="utf-8"))
    assert match is not None
    assert match[0] == tables(read())


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


def test_write_renews_document_and_headers_and_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "glyphs_5way_1shot/CxGrad_4conv"
    lines = one_line(tmp_path, LINE.format(mark="S").replace("toy_5way_1shot/MAML_4conv", name))
    script, document = tmp_path / f"{name}.sh", tmp_path / "results.md"
    script.parent.mkdir()
    shutil.copy(SCRIPTS / f"{name}.sh", script)
    shutil.copy(RESULTS, document)
    monkeypatch.setattr(published, "SCRIPTS", tmp_path)
    monkeypatch.setattr(published, "RESULTS", document)
    published.write(lines)
    assert "\n# Published accuracy: 48.70 ± 1.84 % (as reported by a page).\n# " in script.read_text(encoding="utf-8")
    assert "| MAML, 4-CONV | 48.70 ± 1.84† / – |" in document.read_text(encoding="utf-8")
    before = (SCRIPTS / f"{name}.sh").read_text(encoding="utf-8"), RESULTS.read_text(encoding="utf-8")
    after = script.read_text(encoding="utf-8"), document.read_text(encoding="utf-8")
    for pattern, old, new in zip((IN_SCRIPT, IN_RESULTS), before, after, strict=True):
        assert pattern.sub("", old) == pattern.sub("", new)
