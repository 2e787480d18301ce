"""Tasks of Super-NaturalInstructions (arXiv 2204.07705) as SAPT prepared them: a definition, and instances.

A folder holds `train.json` and `test.json`, each one object with `Definition` and `Instances` (input, output).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_graft.data import hub
from cl_graft.data.columns import Misread
from cl_graft.data.folders import folder_of
from cl_graft.data.parts import Parts, parts
from cl_graft.data.readers import DataError, document
from cl_graft.task import Example

ROOTS = ("superni", "CL_Benchmark/SuperNI", "SuperNI", "")
HUB = "Lots-of-LoRAs"


def read(folder: str, data_dir: Path | None, characters: int | None, end: bool) -> Parts:
    """All examples of a task. Raises DataError.

    characters: length to which an input is cut. end: whether its end is kept.
    """
    if data_dir is None:
        return _of_hub(folder)
    place = folder_of(
        data_dir,
        ROOTS,
        folder,
        "it comes with CL_Benchmark/SuperNI of github.com/circle-hit/SAPT, or is read from "
        f"{HUB}/{folder} of the hub without --data-dir",
    )
    made: dict[str, list[Example]] = {}
    further = 0
    for part in ("train", "test"):
        name = f"{place}/{part}.json"
        held = document(data_dir, name, {"Definition": (str, list), "Instances": list})
        definition = _first(held["Definition"])
        if not definition or not held["Instances"]:
            raise DataError(
                f"{data_dir / name} has no definition or no instance; mend or replace the file."
            )
        made[part] = []
        for number, row in enumerate(held["Instances"], 1):
            try:
                text, answers = _instance(row)
            except Misread as error:
                raise DataError(f"{data_dir / name}, instance {number} {error}") from error
            further += len(answers) > 1
            if characters:
                text = text[-characters:] if end else text[:characters]
            made[part].append(Example(_prompt(definition, text), answers[0]))
    notes = (
        [f"{further:,} rows have several references, of which the first counts"] if further else []
    )
    return parts(folder, made["train"], made["test"], notes)


def _prompt(definition: str, text: str) -> str:
    return f"Definition: {definition}\n\nInput: {text}\nOutput:"


def _instance(row: Any) -> tuple[str, list[str]]:
    """Input and references, each with a blank before it. Raises Misread."""
    if not isinstance(row, Mapping):
        raise Misread(f"is {type(row).__name__}; write an object with input and output.")
    for field in ("input", "output"):
        if field not in row:
            raise Misread(f"has no field {field!r} but {', '.join(map(str, row))}; mend it.")
    text, said = row["input"], row["output"]
    answers = said if isinstance(said, list) else [said]
    if not isinstance(text, str) or not answers or not all(isinstance(a, str) for a in answers):
        raise Misread(
            "is not a text with its answers; write text in input, text or texts in output."
        )
    return text.strip(), [f" {answer.strip()}" for answer in answers]


def _first(said: str | list[Any]) -> str:
    return str(said[0] if isinstance(said, list) and said else said or "").strip()


def _of_hub(folder: str) -> Parts:
    """Examples of the task's data set on the hub, whose inputs are whole prompts: definition, examples, input."""

    def adapt(row: hub.HubRow) -> Example:
        text, answers = _instance(row)
        return Example(text, answers[0])

    train, test = (
        hub.rows(f"{HUB}/{folder}", adapt, ("input", "output"), split=split)
        for split in ("train", "test")
    )
    return parts(folder, train, test)
