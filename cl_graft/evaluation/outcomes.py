"""Evaluate once: outcomes are kept under the fingerprint of the weights that gave them, for every cell to recall.

<cache>/evaluations/<key>.jsonl    a line on who measured what and how many follow, then one an example and metric
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_graft.errors import CLGraftError
from cl_graft.evaluation import endpoint, generate, vllm_server
from cl_graft.evaluation import engine as engine_module
from cl_graft.evaluation.scorers import Scored, base, described
from cl_graft.models import text
from cl_graft.store.digests import code_digest, digest, place, versions, vocabulary
from cl_graft.store.files import read_lines, write_lines
from cl_graft.store.mirror import Mirror
from cl_graft.task import Scoring, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluation_code() -> str:
    """Digest of the code that outcomes depend on, whatever the scorer."""
    return code_digest(*generate.CODE, base, text)


def served_code() -> str:
    """Digest of the code that asks servers."""
    return code_digest(engine_module, endpoint, vllm_server)


def scored_by(task: Task) -> dict[str, dict[str, Any]]:
    """{label: what is known of the scorer}: the part of outcomes' key that scorers decide."""
    return {s.label: {"name": s.name, **described(s)} for s in task.scorings}


def scorers_are_as_then(told: Mapping[str, dict[str, Any]]) -> bool:
    """Whether the scorers of kept outcomes are there, and what they were, as `scored_by` told it."""
    try:
        return all(
            {"name": then["name"], **described(Scoring(then["name"], then["options"]))} == then
            for then in told.values()
        )
    except CLGraftError:
        return False


Results = dict[str, list[Scored]]  # metric -> one outcome an example


@dataclass(frozen=True)
class Outcomes:
    """The folder of evaluations of one cell's `cache`, and the cell that asks."""

    folder: Path
    cell: str = ""
    mirror: Mirror | None = None

    def file(
        self,
        weights: str,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        engine: Mapping[str, Any] | None = None,
        base: str = "",
    ) -> Path:
        """Where the outcomes of these weights are kept: by all that determines them, code and versions included.

        engine: what is known of what answered in the place of the model in this process. base: fingerprint of the
        weights whose answers these were compared with, if any were.
        """
        key = digest(
            weights,
            vocabulary(tokenizer),
            [asdict(example) for example in task.test],
            scored_by(task),
            [task.max_new_tokens, task.training.max_length],
            evaluation_code(),
            place(),
            versions(),
            *([engine, served_code()] if engine else []),
            *([base] if base else []),
        )
        return self.folder / "evaluations" / f"{key}.jsonl"

    def recall(self, file: Path, experience: int) -> tuple[Results, bool] | None:
        """Outcomes, and whether another cell or experience than this one measured them; None if nobody has."""
        if self.mirror and not file.is_file():
            self.mirror.pull(f"cache/evaluations/{file.name}", file)
        if (whole := read_lines(file)) is None:
            return None
        first, lines = whole
        kept: Results = {}
        for line in lines:
            scored = Scored(line["score"], line["answer"], line["note"])
            kept.setdefault(line["metric"], []).append(scored)
        return kept, (first["cell"], first["experience"]) != (self.cell, experience)

    def keep(
        self,
        file: Path,
        task: Task,
        results: Results,
        weights: str,
        experience: int,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        about: dict[str, Any] = {
            "cell": self.cell,
            "experience": experience,
            "task": task.name,
            "weights": weights,
            "scorers": scored_by(task),
            "made_by": {"code": evaluation_code(), **versions()},
            **({"engine": engine} if engine else {}),
        }
        lines = (
            {"metric": metric, "index": i, **asdict(scored)}
            for metric, outcomes in results.items()
            for i, scored in enumerate(outcomes)
        )
        write_lines(file, about, lines)
        if self.mirror:
            self.mirror.push(file, f"cache/evaluations/{file.name}")
