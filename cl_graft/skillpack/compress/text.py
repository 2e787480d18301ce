"""Text as padded batches, and the rows of a calibration file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_graft.errors import CLGraftError
from cl_graft.models.text import encode


def calibration_batches(
    tokenizer_folder: str | os.PathLike[str],
    jsonl_path: str | os.PathLike[str],
    *,
    samples: int,
    length: int,
    batch: int,
) -> list[dict[str, Tensor]]:
    """The first `samples` rows of a JSONL file, at most `length` tokens each, as batches of `batch` rows.

    Rows are {"text": ...}, every token of which is a label, or {"prompt": ..., "completion": ...}, where
    the completion's are (the prompt's are -100). Batches hold input_ids, attention_mask and labels, int64
    (rows, tokens), padded on the right; rows are sorted by length, so that little is padded. Raises
    CLGraftError with the file and the line for a row that is neither, and for a file without rows.
    """
    from cl_graft.models.tokenizer import read

    if min(samples, length, batch) < 1 or length < 2:
        raise CLGraftError(
            f"calibration needs samples >= 1, length >= 2 and batch >= 1; got {samples}, {length} and {batch}."
        )
    rows = _rows(Path(jsonl_path), samples)
    try:
        tokenizer = read(os.fspath(tokenizer_folder))
    except Exception as error:  # each kind of tokenizer has errors of its own
        raise CLGraftError(
            f"{tokenizer_folder} has no readable tokenizer ({type(error).__name__}); give a whole model folder."
        ) from error
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = sorted((_encoded(tokenizer, row, length) for row in rows), key=lambda e: len(e[0]))
    return [padded(encoded[i : i + batch], pad or 0) for i in range(0, len(encoded), batch)]


def _rows(path: Path, most: int) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and len(rows) < most:
                    rows.append(_row(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise CLGraftError(
            f"{path} cannot be read as text ({error}); give a JSONL file."
        ) from error
    if not rows:
        raise CLGraftError(f"{path} has no rows; give a JSONL file with a text on each line.")
    return rows


def _row(line: str, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CLGraftError(f"{where} is not JSON ({error}); write one object a line.") from error
    for fields in (("text",), ("prompt", "completion")):
        if isinstance(row, dict) and all(isinstance(row.get(f), str) for f in fields):
            if row[fields[-1]]:
                return {f: row[f] for f in fields}
            raise CLGraftError(f"{where} has an empty {fields[-1]!r}; fill it or drop the line.")
    raise CLGraftError(
        f'{where} is not {{"text": "..."}} nor {{"prompt": "...", "completion": "..."}}; mend it.'
    )


def _encoded(tokenizer: Any, row: dict[str, str], length: int) -> tuple[list[int], int]:
    """Token ids, and how many of them are the prompt's."""
    if "text" in row:
        return tokenizer(row["text"])["input_ids"][:length], 0
    head, tail = encode(tokenizer, row["prompt"], row["completion"], length)
    tail = [token for token in tail if token is not None]  # no end where the tokenizer has none
    return head + tail, len(head)


def padded(rows: Sequence[tuple[list[int], int]], pad: int) -> dict[str, Tensor]:
    """One batch of (token ids, how many of them are the prompt's), padded on the right.

    input_ids, attention_mask and labels, int64 (rows, tokens); labels are -100 but in the completion.
    """
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (tokens, prompt) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
