"""What a benchmark has measured, a JSON file a cell: a stopped benchmark goes on, and a finished one is read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_graft.store.digests import digest
from cl_graft.store.files import read_json, write_json

HIDDEN = ("delta_digest", "engine_digest", "rows")  # of no use to who watches


@dataclass(frozen=True)
class Cells:
    """The folder of measured cells. say: told what is measured now."""

    folder: Path
    say: Callable[[str], None] = lambda text: None

    def measured(
        self, about: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The figures of a cell, from its file where it has been measured.

        about: everything that the figures depend on, JSON values; the file is named by its digest and holds it.
        """
        file = self.folder / f"{digest(about)}.json"
        if not file.is_file():
            self.say(", ".join(f"{value}" for key, value in about.items() if key not in HIDDEN))
            write_json(file, {"about": about, "figures": measure()})
        return read_json(file)["figures"]
