"""Multi-task training from the base on all tasks seen so far: the reference for intransigence."""

from cl_graft.strategy import Strategy, union


class joint(Strategy):
    """Joint training: stage i learns the union of tasks 1..i with i times one task's steps, from the base.

    Where there is a DPO half it learns the pairs of all of them, with i times its steps.
    """

    keeps = "latest"
    budgeted = False
    start = "base"

    def learn(self, task, context):
        seen = self.scenario.tasks[: len(self.packs) + 1]
        return context.dense(self.fine_tune(union(seen), context, parts=seen))
