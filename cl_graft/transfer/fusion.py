"""What several source models say of a task's rows, fused into one distribution a token, and the loss towards it.

FuseLLM (Wan et al. 2024, arXiv 2401.10491) and FuseChat (arXiv 2408.07990): the likeliest tokens of each source are
put in words of the target's vocabulary where both read the same token; of the sources and the target itself, the one
that finds a row's answer likeliest teaches that row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cl_graft.models.spread import device_of
from cl_graft.models.text import encode_all
from cl_graft.task import Task
from cl_graft.training.term import Term
from cl_graft.transfer import logits
from cl_graft.transfer.align import Aligner, commonest, counted, nearest, texts
from cl_graft.transfer.folder import logits_of
from cl_graft.transfer.logits import Said

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COUNT = 10  # likeliest tokens of the target itself, as of the sources in both papers

Target = dict[int, float]  # a distribution over tokens of the target, without those of share 0


@dataclass(frozen=True)
class Taught:
    """One teacher's distributions in the target's vocabulary, and how far off it finds each answer.

    rows: of each answer token ids int32 and their shares float32, (tokens, K), of which those of share 0 say nothing.
    nll: the mean over the tokens of an answer, in the teacher's own vocabulary, infinite where it has not read it.
    """

    source: str
    rows: Sequence[tuple[Tensor, Tensor]]
    nll: Sequence[float]


def tensors(targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Distributions as a row of `Taught`."""
    width = max(map(len, targets), default=0)
    ids = torch.zeros(len(targets), width, dtype=torch.int32)
    kept = torch.zeros(len(targets), width)
    for n, target in enumerate(targets):
        ids[n, : len(target)] = torch.tensor([*target], dtype=torch.int32)
        kept[n, : len(target)] = torch.tensor([*target.values()])
    return ids, kept


def shares(ids: Sequence[int], values: Sequence[float], words: Mapping[int, int]) -> Target:
    """Softmax over those of a token's logits that have a word in the target; of two with the same the likelier counts.

    ids, values: the likeliest first. words: {id in the source: id in the target}.
    """
    kept: dict[int, float] = {}
    for token, value in zip(ids, values, strict=True):
        if token in words:
            kept.setdefault(words[token], value)
    most = max(kept.values(), default=0.0)
    powers = {token: math.exp(value - most) for token, value in kept.items()}
    whole = sum(powers.values())
    return {token: power / whole for token, power in powers.items()}


def fused(
    said: Sequence[tuple[Sequence[int], Sequence[float]]],
    beside: Sequence[Sequence[int]],
    source: Sequence[str],
    target: Sequence[str],
    gold: Sequence[int],
    words: Mapping[int, int],
    weight: Mapping[tuple[int, int], int] | None = None,
) -> list[Target]:
    """A distribution for each token of an answer as the target spells it.

    said: (ids, logits) at each token of the source. beside: for each token of the target the places in `source`.
    source, target: the tokens' texts. gold: the target's ids, which are what is taught where tokens do not match.

    As in FuseLLM one token beside it, of the same text, is a match. With `weight`, how often the token of a place was
    laid beside the target's, {(place, gold id): count}, as in FuseChat: one token that contains the target's is, too;
    of several that of the same text is, or else all of them where together they are its text, mixed by softmax of
    their weights.
    """
    made = []
    for places, text, token in zip(beside, target, gold, strict=True):
        matched: dict[int, float] = {}
        if len(places) == 1 and (
            text == source[places[0]] or (weight is not None and text in source[places[0]])
        ):
            matched = {places[0]: 1.0}
        elif weight is not None and len(places) > 1:
            same = [place for place in places if source[place] == text]
            if same:
                matched = {same[0]: 1.0}
            elif "".join(source[place] for place in places) == text:
                scores = torch.tensor([float(weight[place, token]) for place in places])
                matched = dict(zip(places, scores.softmax(0).tolist(), strict=True))
        mixed: Target = {}
        for place, part in matched.items():
            for word, share in shares(*said[place], words).items():
                mixed[word] = mixed.get(word, 0.0) + part * share
        whole = sum(mixed.values())
        made.append({w: s / whole for w, s in mixed.items()} if whole else {token: 1.0})
    return made


def translated(
    said: Said, answers: Sequence[Sequence[int]], spelt: Sequence[str], statistics: bool
) -> Taught:
    """A source's words in those of the target. answers: rows of the target's ids. spelt: texts of its vocabulary.

    statistics: match and map tokens by how often they were laid beside each other in these rows, as FuseChat does,
    not by the edits between them, as FuseLLM.
    """
    occurring = {token: spelt[token] for row in answers for token in row}
    align = Aligner(said.texts, occurring)
    read = [i for i, lost in enumerate(said.nll.tolist()) if math.isfinite(lost)]
    parts = {i: [x.tolist() for x in said.row(i)] for i in read}
    beside = {i: align(parts[i][0], answers[i]) for i in read if answers[i]}
    wanted = {i: said.texts[i] for i in said.ids.unique().tolist()}
    counts: Counter[tuple[int, int]] = Counter()
    if statistics:
        counts = counted((parts[i][0], answers[i], beside[i]) for i in beside)
        words = commonest(wanted, spelt, counts)
    else:
        words = nearest(wanted, spelt)
    rows: list[tuple[Tensor, Tensor]] = []
    for i, gold in enumerate(answers):
        if i not in beside:
            rows.append(tensors([{token: 1.0} for token in gold]))
            continue
        tokens, ids, values = parts[i]
        weight = None
        if statistics:
            weight = {(p, g): counts[tokens[p], g] for p in range(len(tokens)) for g in {*gold}}
        source, target = [said.texts[t] for t in tokens], [spelt[t] for t in gold]
        given = list(zip(ids, values, strict=True))
        rows.append(tensors(fused(given, beside[i], source, target, gold, words, weight)))
    return Taught(said.source, rows, said.nll.tolist())


def itself(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> Taught:
    """The target as a teacher of itself, with the weights that it has now."""
    pairs = [(e.prompt, e.completion) for e in task.train]
    if device_of(model).type == "meta":  # of a plan: shapes alone are known
        answers = answers_of(tokenizer, task)
        blank = [(torch.zeros(len(a), COUNT).int(), torch.zeros(len(a), COUNT)) for a in answers]
        return Taught("itself", blank, [0.0] * len(answers))
    own = logits.say(model, tokenizer, pairs, COUNT, task.training.max_length)
    rows = []
    for i, gold in enumerate(answers_of(tokenizer, task)):
        _, ids, values = own.row(i)
        unread = tensors([{token: 1.0} for token in gold])
        rows.append((ids, values.softmax(-1)) if len(ids) else unread)
    return Taught("itself", rows, own.nll.tolist())


def sources(
    tokenizer: PreTrainedTokenizerBase, task: Task, statistics: bool = False
) -> list[Taught]:
    """The sources whose logits are stored beside the task's rows, in words of the target; none without such.

    statistics: as of `translated`. Raises RecordError for stored logits that cannot be read.
    """
    if task.logits is None:
        return []
    spelt, answers = texts(tokenizer), answers_of(tokenizer, task)
    numbers = [example.row for example in task.train]
    made = []
    for name in logits_of(task.logits.folder):
        said = _of_rows(logits.read(task.logits.folder / name), numbers)
        made.append(translated(said, answers, spelt, statistics))
    return made


def untaught(task: Task) -> str:
    """A sentence, without its full stop, on a task that no source teaches; empty for another."""
    if task.logits:
        return ""
    return (
        f"no source teaches task {task.name!r} token by token, for its rows have no stored logits (`transfer build "
        "--logits 10`), so the base alone does"
    )


def _of_rows(said: Said, numbers: Sequence[int | None]) -> Said:
    """What was said of these rows of the folder; None is of no row, and nothing was said of it."""
    empty = said.tokens[:0], said.ids[:0], said.logits[:0]
    parts = [said.row(n) if n is not None else empty for n in numbers]
    tokens, ids, values = (torch.cat(some) for some in zip(*parts, strict=True))
    starts = torch.tensor([0, *(len(part[0]) for part in parts)]).cumsum(0)
    nll = torch.tensor([float(said.nll[n]) if n is not None else math.inf for n in numbers])
    return Said(starts, tokens, ids, values, nll, said.texts, said.source)


def answers_of(tokenizer: PreTrainedTokenizerBase, task: Task) -> list[list[int]]:
    """The tokens of each row that its SFT stage predicts: the answer, cut as it is cut there."""
    given = ((e.prompt, (e.completion,)) for e in task.train)
    encoded = encode_all(tokenizer, given, task.training.max_length)
    return [tail if head else tail[1:] for head, (tail,) in encoded]


def chosen(taught: Sequence[Taught]) -> list[int]:
    """Number, for each row, the teacher that finds its answer likeliest (MinCE); of equal ones the first."""
    every = zip(*(one.nll for one in taught), strict=True)
    return [min(range(len(taught)), key=nll.__getitem__) for nll in every]


def rows_of(taught: Sequence[Taught]) -> list[tuple[Tensor, Tensor]]:
    """What each row is taught, by the teacher that is chosen for it."""
    return [taught[best].rows[i] for i, best in enumerate(chosen(taught))]


def term(rows: Sequence[tuple[Tensor, Tensor]], weight: float) -> Term:
    """The loss of an SFT stage becomes (1 - weight) CE(answer) + weight CE(fused); nothing is added to that of DPO.

    rows: what is taught, of the very rows of the stage, in order.
    """
    width = max((ids.shape[1] for ids, _ in rows), default=0)
    wide = [[pad(x, (0, width - x.shape[1])) for x in row] for row in rows]
    ids, kept = (torch.cat(some) for some in zip(*wide, strict=True))
    starts = torch.tensor([0, *(len(x) for x, _ in rows)]).cumsum(0)
    state = {"starts": starts, "ids": ids, "shares": kept}
    return Term.penalty(penalty, state, logits=True, weight=weight)


def penalty(
    model: Any, batch: dict[str, Tensor], output: Any, state: dict[str, Tensor], *, weight: float
) -> Tensor | dict[str, Tensor]:
    """weight (CE(fused) - CE(answer)), means over the answer tokens of a step; in the log the first CE, too.

    state: `starts` int64 (rows + 1), where each row's tokens are in `ids` and `shares` (tokens, K), the distributions.
    """
    if "completion_mask" in batch:  # DPO
        return output.logits.new_zeros(())
    asked = batch["labels"][:, 1:] != -100
    logs = output.logits[:, :-1][asked].float().log_softmax(-1)
    starts = state["starts"].tolist()
    ranges = [torch.arange(starts[r], starts[r + 1]) for r in batch["rows"].tolist()]
    places = torch.cat(ranges).to(logs.device)
    taught = -(state["shares"][places] * logs.gather(1, state["ids"][places].long())).sum()
    plain = -logs.gather(1, batch["labels"][:, 1:][asked][:, None]).sum()
    ce = (taught / batch["tokens"]).detach()
    return {"pull": weight * (taught - plain) / batch["tokens"], "ce": ce}
