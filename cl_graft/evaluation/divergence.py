"""How far the model that answers has moved from the base on a task's text: KL, in nats a token.

RL's Razor (arXiv 2509.04259) says that forgetting follows from the forward KL to the base on the new task's prompts,
E_x KL(base(. | x) || tuned(. | x)), over whole answers. By the chain rule that is the sum, over the tokens of an answer
drawn from the base, of the KL between the two next-token distributions. Here both models read the reference answers of
test examples instead, so no answer is sampled and every model is measured on the same tokens; and what is given is the
mean over tokens, so that tasks of long and of short answers have one unit. The other direction is measured, too.

<cache>/divergences/<key>.jsonl    a line on who measured what and how many follow, then one an example
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from cl_graft.evaluation import generate
from cl_graft.evaluation.generate import BATCH, left_padded
from cl_graft.models import text
from cl_graft.models.spread import device_of
from cl_graft.models.text import encode
from cl_graft.store.digests import code_digest, digest, place, versions, vocabulary
from cl_graft.store.files import read_lines, write_lines
from cl_graft.store.locks import locked

if TYPE_CHECKING:
    from pathlib import Path

    from cl_graft.evaluation.examiner import Examiner, Group
    from cl_graft.task import Example, Task

MOST = 64  # examples of a task
ROOM = 1 << 27  # logits that a forward pass gives at most, unless one example alone has more
HELD = 1 << 29  # logits of the base that are kept until the other model has read the same
SLICE = 1 << 22  # logits that are compared at a time: float64 takes eight bytes for each

Row = tuple[list[int], list[int]]  # token ids of a prompt, and of its answer


class Moved(NamedTuple):
    """KL of one example, summed over the tokens of its answer (end-of-sequence included), in nats.

    forward: KL(base || tuned). reverse: KL(tuned || base).
    """

    forward: float
    reverse: float
    tokens: int


def measure(
    examiner: Examiner, task: Task, groups: Sequence[Group], experience: int
) -> dict[str, Any] | None:
    """KL between the base and what answers the task: `mean_per_token` of `sample`; None where it cannot be told.

    groups: who answers which of the task's test examples. What the same weights were measured on before is recalled.
    The base is in the model afterwards. experience: tasks learned so far, for the record.
    """
    chosen, found = set(sample(task)), list[Moved]()
    for group in groups:
        mine = [task.test[i] for i in group.examples if i in chosen]
        if mine:
            found += _of_group(examiner, task, group, mine, experience)
    examiner.grafted.unload()
    return mean_per_token(found)


def sample(task: Task) -> list[int]:
    """Indices of at most MOST of the test examples that have a reference answer, drawn alike for every run."""
    answered = [i for i, example in enumerate(task.test) if example.completion]
    return sorted(Random(f"divergence/{task.name}").sample(answered, min(MOST, len(answered))))


def mean_per_token(found: Sequence[Moved]) -> dict[str, Any] | None:
    """{"forward", "reverse": {"value", "stderr"}, "n": examples, "tokens"}, in nats a token.

    A value is the sum over all examples over their tokens; its standard error is that of a ratio of means over
    examples, since tokens of one answer are not independent (Cochran, Sampling Techniques, 1977, 6.4), None for a
    single example. None where there is no example, or where a model's logits are not finite.
    """
    tokens = sum(moved.tokens for moved in found)
    if not tokens or not all(math.isfinite(m.forward + m.reverse) for m in found):
        return None
    return {
        "forward": _ratio([(m.forward, m.tokens) for m in found]),
        "reverse": _ratio([(m.reverse, m.tokens) for m in found]),
        "n": len(found),
        "tokens": tokens,
    }


def _ratio(pairs: Sequence[tuple[float, int]]) -> dict[str, float | None]:
    whole, count = sum(tokens for _, tokens in pairs), len(pairs)
    value = math.fsum(total for total, _ in pairs) / whole
    if count < 2:
        return {"value": value, "stderr": None}
    squares = math.fsum((total - value * tokens) ** 2 for total, tokens in pairs)
    return {"value": value, "stderr": math.sqrt(squares * count / (count - 1)) / whole}


def divergence_code() -> str:
    """Digest of the code that kept divergences depend on."""
    return code_digest(generate, text, sys.modules[__name__])


def _of_group(
    examiner: Examiner, task: Task, group: Group, examples: Sequence[Example], experience: int
) -> list[Moved]:
    """What `per_example` finds, recalled where it is in the cache."""
    weights, outcomes = examiner.fingerprint(group), examiner.outcomes
    pairs = [(example.prompt, example.completion) for example in examples]
    key = digest(
        examiner.grafted.base,
        weights,
        vocabulary(examiner.tokenizer),
        pairs,
        task.training.max_length,
        divergence_code(),
        place(),
        versions(),
    )
    file = outcomes.folder / "divergences" / f"{key}.jsonl"
    name = f"cache/divergences/{file.name}"
    begun = perf_counter()
    with locked(file):
        examiner.waiting_seconds += perf_counter() - begun
        if outcomes.mirror and not file.is_file():
            outcomes.mirror.pull(name, file)
        if (known := _recalled(file)) is not None:
            return known
        begun = perf_counter()
        found = per_example(examiner, pairs, group, task.training.max_length)
        examiner.seconds += perf_counter() - begun
        about = {"cell": outcomes.cell, "experience": experience, "task": task.name}
        about |= {"weights": weights, "made_by": {"code": divergence_code(), **versions()}}
        write_lines(file, about, (moved._asdict() for moved in found))
        if outcomes.mirror:
            outcomes.mirror.push(file, name)
    return found


def _recalled(file: Path) -> list[Moved] | None:
    whole = read_lines(file)
    return None if whole is None else [Moved(**line) for line in whole[1]]


@torch.no_grad()
def per_example(
    examiner: Examiner, pairs: Sequence[tuple[str, str]], group: Group, max_length: int
) -> list[Moved]:
    """KL of each (prompt, answer) between the base and the base with the group's packs on, by the same forward passes.

    Softmax and sums are in float64. Both are the same model object in turn, so the base's logits are held, HELD at a
    time, on the CPU and in the dtype that the model gives them in.
    """
    grafted, tokenizer = examiner.grafted, examiner.tokenizer
    model: Any = grafted.model
    model.eval()
    rows = [encode(tokenizer, *pair, max_length) for pair in pairs]
    found: dict[int, Moved] = {}
    for part in _parts(rows, model.config.get_text_config().vocab_size):
        grafted.unload()
        before = [_logits(model, tokenizer, [rows[i] for i in batch]).cpu() for batch in part]
        grafted.activate(group.packs)
        with examiner.together(group):
            for batch, base in zip(part, before, strict=True):
                now = _logits(model, tokenizer, [rows[i] for i in batch])
                lengths = [len(rows[i][1]) for i in batch]
                sums = [each.split(lengths) for each in both_ways(base, now)]
                for i, forward, reverse in zip(batch, *sums, strict=True):
                    found[i] = Moved(forward.sum().item(), reverse.sum().item(), len(forward))
    return [found[i] for i in range(len(rows))]


def both_ways(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base || tuned) and KL(tuned || base) of next-token logits (N, V), each float64 (N,) on the CPU, in nats."""
    forward, reverse, step = [], [], max(1, SLICE // base.shape[-1])
    for one, other in zip(base.split(step), tuned.split(step), strict=True):
        p, q = (x.to(tuned.device, torch.float64).log_softmax(-1) for x in (one, other))
        forward.append(kl_div(q, p, reduction="none", log_target=True).sum(-1).cpu())
        reverse.append(kl_div(p, q, reduction="none", log_target=True).sum(-1).cpu())
    return torch.cat(forward), torch.cat(reverse)


def _logits(model: Any, tokenizer: Any, rows: Sequence[Row]) -> Tensor:
    """Logits of every answer's tokens, one answer after the other, (tokens, V)."""
    ids, mask = left_padded([head + tail for head, tail in rows], tokenizer.pad_token_id)
    keep = max(len(tail) for _, tail in rows) + 1
    logits = model(
        input_ids=ids.to(device_of(model)),
        attention_mask=mask.to(device_of(model)),
        position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(device_of(model)),
        logits_to_keep=keep,
    ).logits[:, -keep:-1]
    return torch.cat([own[-len(tail) :] for own, (_, tail) in zip(logits, rows, strict=True)])


def _parts(rows: Sequence[Row], vocab: int) -> Iterator[list[list[int]]]:
    """Batches of rows by length, as lists of indices, in parts of which HELD logits are kept."""
    part, held = list[list[int]](), 0
    for batch in _batches(rows, vocab):
        size = vocab * sum(len(rows[i][1]) for i in batch)
        if part and held + size > HELD:
            yield part
            part, held = [], 0
        part.append(batch)
        held += size
    if part:
        yield part


def _batches(rows: Sequence[Row], vocab: int) -> Iterator[list[int]]:
    batch, longest = list[int](), 0
    for i in sorted(range(len(rows)), key=lambda i: (sum(map(len, rows[i])), i)):
        widest = max(longest, len(rows[i][1]) + 1)
        if batch and (len(batch) == BATCH or widest * (len(batch) + 1) * vocab > ROOM):
            yield batch
            batch, widest = [], len(rows[i][1]) + 1
        batch.append(i)
        longest = widest
    if batch:
        yield batch
