"""Self-distillation from demonstrations: a teacher that is shown them (Shenfeld et al. 2026, arXiv 2601.19897).

Not the SDFT of Yang et al. 2024 (arXiv 2402.13669), which has the model reword the training answers and trains on them.

Of each prompt x the student draws an answer y at temperature 1. The teacher reads x and the task's own answer as a
demonstration, in the paper's words, and then y. The loss is KL(teacher || student) over the whole vocabulary at every
token of y, the mean over an answer's tokens, then over answers. The paper's equation 1 is the reverse, KL(student ||
teacher); its authors have said that all of its results are of the forward one, which their code takes (issue 5 of
idanshen/Self-Distillation). TRL's experimental trainer (1.16) takes neither by itself, but a mixture of both (alpha .5)
on the student's 100 likeliest tokens, from a teacher that stands still.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cl_graft.evaluation.generate import endings
from cl_graft.models.chat import added
from cl_graft.models.text import encode_prompts
from cl_graft.ranges import Share
from cl_graft.skillpack.codecs import Encoded
from cl_graft.strategy import Context, Strategy
from cl_graft.task import Task
from cl_graft.training.config import sft_job
from cl_graft.training.term import Term

SHOWN = (
    "\nThis is an example for a response to the question:\n{}"
    "\nNow answer with a response of your own, including the thinking process:\n"
)
TEACHER = "teacher/"  # before the names of its parameters


class sdft(Strategy):
    """SFT on the student's own answers, by the teacher's probabilities; DPO, where a recipe has that half, is as it is.

    The teacher's weights are a moving average of the student's over the steps of a task, from its start on, in float32;
    nothing of it is kept. A step costs the drawing of its answers and a pass of the teacher, and logits of both over
    the answers' tokens. Prompts are cut at their start to what the model's positions leave. A base that makes nothing
    of a demonstration has nothing to teach: in the paper one of 3 B parameters gains less than by SFT.
    """

    keeps = "latest"
    terms = ("loss", "follow")
    budgeted = False

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        rate: Share = 0.01,
        skip: Annotated[int, Field(ge=0)] = 0,
    ) -> dict[str, Encoded]:
        """rate: what the average takes of the student after each step; the paper tries .01, .02 and .05, 0 is a
        teacher that stands still. skip: first tokens of each answer that are left out of the loss; 3 in the authors'
        script, against words such as "Based on the example", more than short answers have.
        """
        tokenizer, length = context.tokenizer, task.max_new_tokens
        rows = sft_job(task, self.seed)[0]
        asked = [r["prompt"] for r in rows]
        shown = [added(tokenizer, r["prompt"], SHOWN.format(r["completion"])) for r in rows]
        longest = getattr(self.model.config, "max_position_embeddings", None)
        room = max(1, longest - length) if longest else None
        weights = self.model.named_parameters()
        state = {
            "asked": _padded(encode_prompts(tokenizer, asked), room),
            "shown": _padded(encode_prompts(tokenizer, shown), room),
            **{TEACHER + n: p.detach().to(torch.float32, copy=True) for n, p in weights},
        }
        options = {"length": length, "skip": skip, "pad": tokenizer.pad_token_id}
        ends = endings(self.model, tokenizer)
        terms = [
            Term.loss(loss, state, ends=ends, **options),
            Term.follow(follow, state, rate=rate),
        ]
        return context.dense(self.fine_tune(task, context, terms))


def _padded(rows: list[list[int]], room: int | None) -> Tensor:
    """The ends of rows of tokens, int32 (rows, longest), with -1 before the shorter ones."""
    cut = [torch.tensor(r[-room:] if room else r, dtype=torch.int32) for r in rows]
    return pad_sequence(cut, batch_first=True, padding_value=-1, padding_side="left")


def loss(
    model: Any,
    batch: dict[str, Any],
    output: Any,
    state: dict[str, Tensor],
    *,
    length: int,
    skip: int,
    pad: int,
    ends: list[int],
) -> Tensor:
    """The mean over rows of the mean KL(teacher || student) of an answer that the student draws, from token `skip` on.

    state: asked and shown, the prompts of all rows of the stage for student and teacher, as `_padded` gives them; and
    the teacher's parameters.
    """
    teacher = {n.removeprefix(TEACHER): x for n, x in state.items() if n.startswith(TEACHER)}
    asked, shown = (_trimmed(state[which][batch["rows"]].long()) for which in ("asked", "shown"))
    training = model.training
    model.eval()  # neither answers nor what the teacher says of them are drawn with dropout
    with torch.no_grad():
        said, read = drawn(model, asked, length, pad, ends)
        given = _given(shown, said, read, pad)
        theirs = torch.func.functional_call(model, teacher, kwargs=given).logits
    model.train(training)
    ours = model(**_given(asked, said, read, pad)).logits
    ours, theirs = (x[:, :-1].float().log_softmax(-1) for x in (ours, theirs))
    apart = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    counted = read & (torch.arange(said.shape[1], device=said.device) >= skip)
    return ((apart * counted).sum(1) / counted.sum(1).clamp(min=1)).mean()


def follow(model: Any, state: dict[str, Tensor], step: int, *, rate: float) -> None:
    """Teacher <- teacher + rate (student - teacher)."""
    for name, parameter in model.named_parameters():
        state[TEACHER + name].lerp_(parameter.to(state[TEACHER + name].dtype), rate)


def drawn(
    model: Any, prompts: Tensor, length: int, pad: int, ends: list[int]
) -> tuple[Tensor, Tensor]:
    """Answers that the model draws at temperature 1, (rows, at most `length`), and which tokens are theirs, bool; the
    one that ends an answer is. prompts: tokens with -1 before them."""
    said = model.generate(
        input_ids=prompts.where(prompts >= 0, pad),
        attention_mask=(prompts >= 0).long(),
        max_new_tokens=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=pad,
        eos_token_id=ends,
    )[:, prompts.shape[1] :]
    ended = torch.isin(said, torch.tensor(ends, device=said.device)).long()
    return said, ended.cumsum(1) - ended == 0


def _given(prompts: Tensor, said: Tensor, read: Tensor, pad: int) -> dict[str, Any]:
    """What the model reads of prompts and answers, for the logits of the answers' tokens and one more."""
    mask = torch.cat([prompts >= 0, read], 1).long()
    ids = torch.cat([prompts.where(prompts >= 0, pad), said], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    keep = {"logits_to_keep": said.shape[1] + 1, "use_cache": False}
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **keep}


def _trimmed(prompts: Tensor) -> Tensor:
    """Cut away what is before all of them."""
    return prompts[:, int((prompts < 0).all(0).sum()) :]
