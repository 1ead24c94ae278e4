"""A shortened form of `python -m tests.fuzzing`, and what that counts as a failure."""

import sys
from collections import Counter

import pytest

from tests.fuzzing import ACCEPTED, KINDS, REFUSED, fuzz, outcome_of
from utils.errors import UserError


def test_no_odd_input_ends_in_a_traceback_or_starts_on_nonsense() -> None:
    tally = fuzz(examples=200, start=0)
    assert not tally.failures, "\n".join(tally.failures.values())
    outcomes = Counter((kind.partition(",")[0], found) for kind, found in tally.counts.elements())
    assert outcomes.keys() == {(kind, found) for kind in KINDS for found in (ACCEPTED, REFUSED)}


def test_tracebacks_long_messages_and_other_statuses_are_failures() -> None:
    def refuse(message: str) -> None:
        raise UserError(message)

    assert outcome_of(lambda: refuse("no such file")) == REFUSED
    assert outcome_of(lambda: sys.exit(0)) == ACCEPTED
    for failing in (lambda: refuse("a line\n" * 9), lambda: refuse("a word " * 500), lambda: sys.exit(1)):
        with pytest.raises(AssertionError):
            outcome_of(failing)
    with pytest.raises(ZeroDivisionError):
        outcome_of(lambda: 1 / 0)
