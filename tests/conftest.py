"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real archives and full recordings beside the checkout; its tests skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared (real archives, class splits, full recordings) is not here")
    return SHARED
