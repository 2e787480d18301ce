"""A run that is killed at any time, again and again, ends with the numbers of one that was left alone.

`CL_GRAFT_KILLS=100 pytest tests/test_kills.py` is the long run over all strategies; tests/kills.py prints its table.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import kills

KILLS = int(os.environ.get("CL_GRAFT_KILLS", "6"))
FEW = ("lora", "replay + DPO", "magnitude + router")


@pytest.mark.slow
@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_again_and_again_a_run_ends_with_the_numbers_of_one_left_alone(
    tmp_path: Path,
) -> None:
    """After each kill all that a reader would accept is whole (`kills.assert_whole`); at the end nothing is left over."""
    every = kills.subjects()
    chosen = every if 2 * len(every) <= KILLS else [s for s in every if s.name in FEW]
    rows = kills.stories(tmp_path, KILLS, 0, chosen)
    found = kills.total(rows)
    assert found.different == []
    assert found.identical == found.kills == KILLS
    assert found.single and found.sweep
    print(kills.table(rows))
