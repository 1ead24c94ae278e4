"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

from utils.progress import set_up_logging

set_up_logging()  # so that capsys sees the messages of functions that an entry point would call

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden arrays and real archives beside the checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared (golden arrays and real archives) is not here")
    return SHARED
