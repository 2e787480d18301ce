"""Multi-task training from the base on all tasks seen so far: the reference for intransigence."""

from dataclasses import replace

from cl_graft.strategy import Strategy


class joint(Strategy):
    """Joint training: stage i learns the union of tasks 1..i with i times one task's steps, from the base."""

    keeps = "latest"
    budgeted = False
    start = "base"

    def learn(self, task, context):
        seen = self.scenario.tasks[: len(self.packs) + 1]
        union = [example for other in seen for example in other.train]
        recipe = replace(task.training, steps=task.training.steps * len(seen))
        return context.dense(self.fine_tune(replace(task, train=union, training=recipe), context))
