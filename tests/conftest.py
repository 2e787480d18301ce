"""Shared pieces: a tiny scenario and the smallest embedded model, made once."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings

from cl_graft import plugins
from cl_graft.budget import Budget
from cl_graft.cli import main
from cl_graft.models.load import load
from cl_graft.task import Scenario
from tests.command import Call, Done

_frozen = 0  # modules when garbage was last looked for among them

settings.register_profile("any machine", deadline=None)  # a busy one may take a second for anything
settings.load_profile("any machine")

pytest.register_assert_rewrite("tests.faults", "tests.full_disk", "tests.kills", "tests.refusals")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first, so that no worker is left alone with one of them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Same numbers whatever the machine's number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def modules_are_no_garbage() -> None:
    """Trainers collect garbage; looking through all that was imported is a quarter of a tiny stage's time."""
    global _frozen
    if len(sys.modules) > _frozen + 300:
        _frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture
def nano() -> tuple[Any, Any]:
    """A fresh nano-llama and its tokenizer."""
    return load("nano-llama")


@pytest.fixture
def tiny_scenario() -> Scenario:
    """`mini` in seconds: two tasks that need no sandbox, six steps each."""
    make = plugins.load("scenario", "mini")
    return make(
        seed=0,
        train_size=48,
        test_size=16,
        steps=6,
        batch=8,
        tasks="math,cipher",
        learning_rate=3e-3,
    )


@pytest.fixture
def build(nano: tuple[Any, Any], tiny_scenario: Scenario) -> Callable[..., Any]:
    """Make a strategy by name on the tiny scenario; keyword arguments are its options."""

    def make(
        name: str, budget: str = "10%", scenario: Scenario = tiny_scenario, **options: Any
    ) -> Any:
        model, tokenizer = nano
        found = plugins.load("strategy", name)
        return found(
            model=model,
            tokenizer=tokenizer,
            scenario=scenario,
            budget=Budget(budget, sum(p.numel() for p in model.parameters())),
            seed=0,
            options=plugins.check_options("strategy", name, found, options),
            allow_code=False,
        )

    return make


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `cl-graft` with these words in this process."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["cl-graft", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Done(int(ended.value.code or 0), said.out, said.err)

    return run
