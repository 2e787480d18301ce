"""What an installation has: the package with its plug-ins and data, and no benchmark."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from tests.command import Done, assert_refused

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGET = CONFIG["tool"]["hatch"]["build"]["targets"]["wheel"]


def test_what_the_wheel_is_made_of() -> None:
    assert TARGET["packages"] == ["cl_graft"]
    assert TARGET["exclude"] == ["cl_graft/bench"]
    for source, target in TARGET["force-include"].items():
        assert (ROOT / source).is_dir() and target == f"cl_graft/{source}"


def test_the_wheel_has_the_plug_ins_and_no_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build backend is not installed here")
    words = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*words, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    there = {
        file.relative_to(ROOT).as_posix()
        for folder in ("cl_graft", "scenarios", "baselines")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    bench = {name for name in there if name.startswith("cl_graft/bench/")}
    plugins = {name for name in there if not name.startswith("cl_graft/")}
    expected = there - bench - plugins | {f"cl_graft/{name}" for name in plugins}
    assert bench and plugins
    assert {name for name in names if not name.startswith("cl_graft-")} == expected


def test_an_installation_says_where_the_benchmarks_are(tmp_path: Path) -> None:
    (tmp_path / "cl_graft").mkdir()
    for entry in (ROOT / "cl_graft").iterdir():
        if entry.name != "bench":
            (tmp_path / "cl_graft" / entry.name).symlink_to(entry)

    def call(*words: str) -> Done:
        words = (sys.executable, "-m", "cl_graft", "bench", *words)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        ran = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return Done(ran.returncode, ran.stdout, ran.stderr)

    assert_refused(call("plan"), "in a checkout of the source", "pip install --editable .")
    assert "--data-dir" in call("pack", "--help").out


def test_the_oldest_versions_are_those_that_the_package_allows() -> None:
    """What `make oldest` installs, DeepSpeed among it; of torch a newer one, whose builds without CUDA are to be had."""
    project = CONFIG["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["deepspeed"]]
    allowed = dict(re.findall(r"^([\w-]+)[>=]=([\d.]+)", "\n".join(wanted), re.M))
    text = (ROOT / "requirements-oldest.txt").read_text(encoding="utf-8")
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.M))
    assert allowed.keys() == oldest.keys() | {"avalanche-lib"}  # which is pinned
    for name in oldest.keys() - {"torch"}:
        assert Version(allowed[name]) == Version(oldest[name]), name
    assert Version(allowed["torch"]) <= Version(oldest["torch"])
