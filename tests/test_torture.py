"""The short form of `make torture`: whatever is done to the program, nothing is lost and every error is one line."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.torture import SECTIONS, Skipped, tried
from tests.torture_lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with closing(Lab(tmp_path_factory.mktemp("torture"), seed=0, short=True)) as lab:
        yield lab


@pytest.mark.parametrize("section", SECTIONS)
def test_the_program_withstands(section: str, lab: Lab) -> None:
    try:
        found = tried(section, lab)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert found and not [problem for problem in found if problem]
