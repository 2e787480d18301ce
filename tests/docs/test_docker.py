"""The Dockerfile is read, not built: there need be no Docker here."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cl_graft.cli import built

ROOT = Path(__file__).parents[2]
KNOWN = {"ARG", "FROM", "RUN", "USER", "WORKDIR", "COPY", "CMD"}


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text()
    bare = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    lines = bare.replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (ln.partition(" ") for ln in lines) if word]


def test_every_line_is_an_instruction_and_it_begins_from_the_argument() -> None:
    found = instructions()
    assert {word for word, _ in found} == KNOWN
    assert [word for word, _ in found[:2]] == ["ARG", "FROM"]
    assert found[0][1].startswith("BASE=python:3.11") and found[1][1] == "${BASE}"
    declared = {rest.split("=")[0] for word, rest in found if word == "ARG"}
    used = set(re.findall(r"\$\{(\w+)\}", " ".join(rest for _, rest in found)))
    assert used == declared


def test_nothing_runs_as_root_once_files_are_there() -> None:
    words = [word for word, _ in instructions()]
    assert words.index("USER") < words.index("COPY")
    assert ("USER", "graft") in instructions()
    assert words.count("USER") == 1


def test_the_targets_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake\"?,? \"?([a-z-]+)", (ROOT / "Dockerfile").read_text()))
    assert named == {"demo", "test", "env"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize(
    "needed",
    ["Makefile", "pyproject.toml", "requirements.lock", "README.md", "LICENSE", "cl_graft"]
    + ["scenarios", "baselines", "tests", "docs", "mkdocs.yml", "results/published"],
)
def test_what_the_two_commands_need_is_copied(needed: str) -> None:
    assert (ROOT / needed).exists()
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern, keeps = line.removeprefix("!"), line.startswith("!")
        if fnmatch.fnmatch(needed, pattern.removeprefix("**/")):
            ignored = not keeps
    assert not ignored


def test_the_commands_in_its_comments_are_those_of_the_command_line() -> None:
    """And the one that runs mini, which has programs to run, gives its consent."""
    text = re.sub(r"\\\n# *", "", (ROOT / "Dockerfile").read_text())
    lines = re.findall(r"^# .*\.venv/bin/cl-graft (.*)$", text, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["doctor", "sweep"]
    for line in lines:
        name, *words = shlex.split(line, comments=True)
        command: Any = built(name)
        with command.make_context(name, words) as context:
            assert name != "sweep" or context.params["allow_code_execution"]


def test_the_shell_commands_are_shell() -> None:
    for word, rest in instructions():
        if word == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
