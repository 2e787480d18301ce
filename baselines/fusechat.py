"""FuseChat: a student of each source, taught token by token, then all students merged by SCE (arXiv 2408.07990)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from cl_graft import plugins
from cl_graft.ranges import Part, Rest
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.compress.policy import Paper
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.composed import compose
from cl_graft.strategy import Context, Strategy
from cl_graft.strategy.graftllm import packed, possible
from cl_graft.task import Task
from cl_graft.training.delta import Delta
from cl_graft.transfer.fusion import itself, rows_of, sources, term, untaught


class fusechat(Strategy):
    """A student of each source whose logits are stored beside a task's rows (`transfer build --logits 10`, then
    `--train-on`) is trained from the base on these rows: the loss is (1 - weight) CE(answer) + weight CE(fused), where
    `fused` is what the source or the base says, whichever finds the row's answer likelier.

    Vocabularies are mapped by how often tokens lie beside each other. The students of a task are merged by `sce`, and
    so are, when asked, what all tasks have left: with a source a task that is the paper's merge of all students. A
    task without stored logits has one student, of the base alone, of which there is a note. DPO follows in each.
    """

    keeps = "merged"
    terms = ("penalty",)
    budgeted = False

    def __init__(self, **given):
        super().__init__(**given)
        # a reference of any size, or packs like others
        self.budgeted = self.options["pack"]

    def check(self, context: Context, *, pack: bool, **options) -> None:
        if pack:
            possible(context, Paper())

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        weight: Rest = 0.1,
        density: Part = 0.1,
        pack: bool = False,
    ) -> dict[str, Encoded]:
        """weight: of the fused distribution, 0.1 as in the paper. density: of SCE's selection, the paper's 10 %. pack:
        keep GraftLLM's pack of what the task's students make, within its budget, in place of the whole delta."""
        own, others = itself(self.model, self.tokenizer, task), sources(self.tokenizer, task, True)
        self.notes += [untaught(task)] if not others else []
        students: list[Delta] = []
        for pair in [[own, other] for other in others] or [[own]]:
            self.restore_base()
            students.append(self.fine_tune(task, context, [term(rows_of(pair), weight)]))
        merged = _Merged(students, density)
        return packed(merged, context, Paper(), 8) if pack else context.dense(merged)

    def unlearn(self, task: Task, context: Context, **options) -> dict[str, Encoded]:
        """Nothing is kept: the students of the task that goes are no longer merged."""
        return {}

    def compose(self, task):
        if len(self.held) < 2:
            return self.held
        shapes = self.held[0].shapes
        return [compose(across, self.held, shapes, density=self.options["density"])]

    # what it does to training are terms, which are in a stage's key: with a pack or without, it is the same stage
    learn.pure = True


def sce(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Merge a parameter's deltas as the strategy `sce` does; one alone is itself."""
    merge = plugins.load("strategy", "sce").function
    return merge(deltas, density=density) if len(deltas) > 1 else deltas[0]


def across(name: str, *packs: SkillPack, density: float) -> Tensor:
    """A parameter's delta, merged of all tasks'."""
    return sce([pack.delta(name) for pack in packs], density)


class _Merged(Mapping[str, Tensor]):
    """{parameter: delta} merged of a task's students when it is asked for."""

    def __init__(self, students: Sequence[Delta], density: float):
        self.students, self.density = students, density

    def __getitem__(self, name: str) -> Tensor:
        return sce([student[name] for student in self.students], self.density)

    def __iter__(self) -> Iterator[str]:
        return iter(self.students[0])

    def __len__(self) -> int:
        return len(self.students[0])
