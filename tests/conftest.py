"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

from utils.progress import set_up_logging

set_up_logging()  # so that capsys sees the messages of functions that an entry point would call

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real archives and full recordings beside the checkout; its tests skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared (real archives, class splits, full recordings) is not here")
    return SHARED
