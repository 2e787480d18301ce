"""FuseLLM: one model taught token by token by several models of other vocabularies (arXiv 2401.10491, ICLR 2024)."""

from __future__ import annotations

from dataclasses import replace

from cl_graft.ranges import Rest
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.compress.policy import Paper
from cl_graft.strategy import Context, Strategy, union
from cl_graft.strategy.graftllm import packed, possible
from cl_graft.task import Task
from cl_graft.transfer.fusion import itself, rows_of, sources, term, untaught


class fusellm(Strategy):
    """Each task trains the base anew on the rows of all tasks so far, as one corpus, with i times one task's steps.

    The loss is (1 - weight) CE(answer) + weight CE(fused), where `fused` is what the teacher of a row says at each
    token: of the sources whose logits are stored beside the row (`transfer build --logits 10`, then `--train-on`) and
    the base itself, the one that finds the answer likeliest. A task without stored logits is taught by the base alone,
    of which there is a note. DPO follows on the pairs of all tasks, without a teacher.
    """

    keeps = "latest"
    terms = ("penalty",)
    budgeted = False
    start = "base"

    def __init__(self, **given):
        super().__init__(**given)
        # a reference of any size, or a pack like others
        self.budgeted = self.options["pack"]
        self.taught = {}

    def check(self, context: Context, *, pack: bool, **options) -> None:
        if pack:
            possible(context, Paper())

    def learn(
        self, task: Task, context: Context, *, weight: Rest = 0.1, pack: bool = False
    ) -> dict[str, Encoded]:
        """weight: of the fused distribution, the paper's 0.1. pack: keep GraftLLM's pack of the model, within one
        task's budget, in place of the whole delta."""
        seen = self.scenario.tasks[: len(self.packs) + 1]
        rows, every = [row for other in seen for row in self._rows(other)], union(seen)
        delta = self.fine_tune(every, context, [term(rows, weight)], seen)
        if not pack:
            return context.dense(delta)
        return packed(delta, replace(context, task=every), Paper(), 8)

    def _rows(self, task: Task):
        """What the rows of a task are taught; the model holds the base's weights."""
        if task.name not in self.taught:
            own, others = itself(self.model, self.tokenizer, task), sources(self.tokenizer, task)
            self.taught[task.name] = rows_of([own, *others])
            self.notes += [untaught(task)] if not others else []
        return self.taught[task.name]

    # what it does to training are terms, which are in a stage's key: with a pack or without, it is the same stage
    learn.pure = True
