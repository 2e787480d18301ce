"""What is measured of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PEAKS = """
from cl_graft.store.digests import forget_peak_memory, peak_memory_mb
large = bytearray(200 << 20)
del large
before = peak_memory_mb()
forget_peak_memory()
print(before - peak_memory_mb() > 150)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_the_peak_of_an_earlier_cell_is_forgotten() -> None:
    """As where Ray gives one process to several."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
