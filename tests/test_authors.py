"""What authors of strategies, scenarios and scorers get wrong: one sentence with file and line, at `validate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import Call, assert_refused

STRATEGY = "from cl_graft.strategy import Strategy, compressor, merger\n"
CLASS = f"{STRATEGY}class mine(Strategy):\n"
STRATEGIES = {
    "a syntax error": ("x = 1\ndef mine(:\n", 2, "SyntaxError"),
    "an import that is not there": ("\n\nimport no_such_module\n", 3, "No module named"),
    "raises when it is imported": ("def f():\n    return 1 / 0\nf()\n", 2, "ZeroDivisionError"),
    "not decorated": ("\ndef mine(delta, context):\n    return {}\n", 2, "@compressor"),
    "no learn": (f"{CLASS}    keeps = 'latest'\n", 2, "`learn`"),
    "too few arguments": (f"{STRATEGY}@compressor()\ndef mine(delta): ...\n", 2, "delta, context"),
    "a merger of two": (f"{STRATEGY}@merger\ndef mine(a, b): ...\n", 2, "arguments deltas"),
    "a learn without context": (f"{CLASS}    def learn(self, task): ...\n", 3, "task, context"),
    "an option without default": (
        f"{STRATEGY}@compressor()\ndef mine(delta, context, *, share): ...\n",
        2,
        "share",
    ),
    "raw tensors": (
        f"{STRATEGY}@compressor()\ndef mine(delta, context):\n    return dict(delta)\n",
        2,
        "codecs.dense",
    ),
    "nothing": (f"{STRATEGY}@compressor()\ndef mine(delta, context):\n    pass\n", 2, "NoneType"),
    "a shared artefact that is raw": (
        f"from cl_graft.strategy import Kept\n{CLASS}    def learn(self, task, context):\n"
        "        return Kept({}, {'memory': [1]})\n",
        4,
        "a list",
    ),
    "a merger that returns a list": (
        f"{STRATEGY}@merger\ndef mine(deltas):\n    return deltas\n",
        2,
        "one tensor",
    ),
    "a name that is not there": (
        f"{STRATEGY}@compressor()\ndef mine(delta, context):\n    return delta_of(context)\n",
        4,
        "'delta_of' is not defined",
    ),
    "a call that is not there": (
        f"{CLASS}    def learn(self, task, context):\n        return context.no_such_call(self)\n",
        4,
        "no_such_call",
    ),
}
SCENARIO = "from cl_graft.task import *\ndef mine(*, seed, data_dir=None):\n"
SCENARIOS = {
    "dicts for examples": (
        f"{SCENARIO}    rows = [{{'prompt': 'a', 'completion': 'b'}}]\n"
        "    return Scenario('mine', (Task('t', rows, rows, 'exact'),))\n",
        4,
        "train[0] is of type dict; make it a cl_graft.task.Example(prompt, completion)",
    ),
    "one dict among the tests": (
        f"{SCENARIO}    rows = [Example('a', 'b')]\n"
        "    return Scenario('mine', (Task('t', rows, rows + [{}], 'exact'),))\n",
        4,
        "test[1] is of type dict",
    ),
    "a generator of examples": (
        f"{SCENARIO}    rows = (Example('a', 'b') for _ in range(3))\n"
        "    return Scenario('mine', (Task('t', rows, rows, 'exact'),))\n",
        4,
        "give a list",
    ),
    "an unknown scorer": (
        f"{SCENARIO}    rows = [Example('a', 'b')] * 30\n"
        "    return Scenario('mine', (Task('t', rows, rows, 'exakt'),))\n",
        4,
        "no scorer named 'exakt'; did you mean exact",
    ),
    "a task that is a tuple": (f"{SCENARIO}    return Scenario('mine', [('t', [])])\n", 3, "Task("),
    "a word that Task does not know": (
        f"{SCENARIO}    return Scenario('mine', (Task('t', [], [], scorer='exact'),))\n",
        3,
        "unexpected keyword argument 'scorer'",
    ),
    "no seed": ("def mine():\n    return 1\n", 1, "arguments seed and data_dir"),
    "a list": ("def mine(*, seed, data_dir=None):\n    return [seed]\n", 1, "returns list"),
    "raises": (f"{SCENARIO}    return open('nowhere').read()\n", 3, "FileNotFoundError"),
    "a scorer of one argument": (
        f"from cl_graft.evaluation.scorers import scorer\n{SCENARIO}    rows = [Example('a', 'b')] * 30\n"
        "    return Scenario('mine', (Task('t', rows, rows, 'own'),))\n"
        "@scorer()\ndef own(example):\n    return 1.0\n",
        6,
        "example, answer",
    ),
}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def validated(call: Call, scenario: str, strategy: str) -> None:
    Path("sweep.yaml").write_text(
        f"scenarios: [{scenario}]\nstrategies: [{strategy}]\nmodels: [nano-llama]\nwandb: off\n"
    )


@pytest.mark.parametrize("mistake", STRATEGIES)
def test_a_mistake_in_a_strategy(mistake: str, call: Call) -> None:
    text, line, told = STRATEGIES[mistake]
    Path("mine.py").write_text(text)
    validated(call, "{mini: {tasks: cipher}}", "./mine.py")
    assert_refused(call("validate", "sweep.yaml"), f"mine.py, line {line}", told)


@pytest.mark.parametrize("mistake", SCENARIOS)
def test_a_mistake_in_a_scenario(mistake: str, call: Call) -> None:
    text, line, told = SCENARIOS[mistake]
    Path("mine.py").write_text(text)
    validated(call, "./mine.py", "lora")
    assert_refused(call("validate", "sweep.yaml"), f"mine.py, line {line}", told)


@pytest.mark.parametrize("command", ["run", "plan", "sweep"])
def test_the_other_commands_say_the_same(command: str, call: Call) -> None:
    """`plan` as `validate`, on a toy; the others where it happens, since a file of the user's runs once there."""
    text, line, told = STRATEGIES["raw tensors"]
    Path("mine.py").write_text(text)
    words = ["--scenario", "mini", "--strategy", "mine.py"]
    words = words if command == "run" else ["--scenarios", "mini", "--strategies", "mine.py"]
    models = "--model" if command == "run" else "--models"
    small = ["steps=1", "train_size=8", "test_size=2", "tasks=cipher"]
    words += [word for s in small for word in ("--set", f"mini.{s}")]
    done = call(command, *words, models, "nano-llama", "--wandb", "off")
    assert done.code == 1 and "Traceback" not in done.err
    assert f"mine.py, line {line}" in done.err and told in done.err


def test_what_may_be_the_toys_fault_is_no_mistake(call: Call) -> None:
    Path("mine.py").write_text(
        f"{STRATEGY}from cl_graft.skillpack.codecs import dense\n@compressor()\n"
        "def mine(delta, context):\n"
        "    if context.model.config.hidden_size < 48: raise ValueError('too narrow')\n"
        "    return {name: dense(x) for name, x in delta.items()}\n"
    )
    validated(call, "{mini: {tasks: cipher}}", "./mine.py")
    assert call("validate", "sweep.yaml").code == 0
