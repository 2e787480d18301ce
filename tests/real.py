"""The data sets themselves, where a machine has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "shared" / "data"
DATA = Path(os.environ.get("CL_GRAFT_TEST_DATA") or HERE)


def needs_data(*sets: str) -> pytest.MarkDecorator:
    """For a test that reads these data sets: it is skipped where they are not."""
    return pytest.mark.skipif(
        not all((DATA / name).is_dir() for name in sets),
        reason=f"no real data: set CL_GRAFT_TEST_DATA to the folder that holds {', '.join(sets)}, ...",
    )
