"""A method learns two toy tasks, a step each, so that an author's mistake is found before any real task is trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cl_graft.budget import Budget
from cl_graft.errors import AuthorMistake, CLGraftError
from cl_graft.models.embedded import new_llama, toy_tokenizer
from cl_graft.models.recipe import ModelRecipe
from cl_graft.plugins import place, reason
from cl_graft.task import Example, Scenario, Task, Training

if TYPE_CHECKING:
    from cl_graft.strategy import Strategy

TOY = ModelRecipe("random weights", hidden=16, layers=2, heads=2, ffn=32, steps=0, lr=0.0)
MISTAKES = (
    NameError,
    TypeError,
    AttributeError,
    ImportError,
    KeyError,
)  # whatever the model and the data are


def trial(kind: type[Strategy], options: Mapping[str, Any]) -> None:
    """Learn, merge and answer on a model of random weights with room for everything; nothing of it is kept.

    Raises CLGraftError with file and line for what an author has to mend. What may be the toy's fault, as a rank that
    it is too narrow for, is not told: the real model is going to.
    """
    import torch

    from cl_graft.stream import benchmark
    from cl_graft.training.fit import quiet

    tokenizer = toy_tokenizer()
    scenario = Scenario("trial", (_task("first"), _task("second")))
    with torch.random.fork_rng(devices=[]), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            strategy = kind(
                model=new_llama(TOY, len(tokenizer)),
                tokenizer=tokenizer,
                scenario=scenario,
                budget=Budget("1GB", 10**9),
                seed=0,
                options=options,
            )
            stream = benchmark(scenario)
            for experience in stream.train_stream:
                strategy.train(experience, eval_streams=[])
            strategy.eval(stream.test_stream)
        except AuthorMistake:
            raise
        except MISTAKES as error:
            if place(error):
                raise CLGraftError(
                    f"{kind.__name__} fails on two toy tasks ({reason(error)}); mend it."
                ) from error
        except Exception:  # it may need more than the toy has
            return


def _task(name: str) -> Task:
    examples = [Example(f"{name} {number}", "1") for number in range(4)]
    return Task(
        name, examples, examples[:2], "exact", max_new_tokens=2, training=Training(steps=1, batch=2)
    )
