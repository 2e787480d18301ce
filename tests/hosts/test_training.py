"""A stage on two hosts, by DeepSpeed's launcher over ssh: the same weights as in one process, and a host that is lost."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cl_graft.config import Launch
from tests.hosts.network import Host, Hosts, lacking
from tests.hosts.stage import SILENCE
from tests.training.test_launch import SFT, TOLERANCE, trained

reason = lacking()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason), reason=reason)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "hostfile").write_text("alpha slots=1\nbeta slots=1\n")
    with Hosts(folder) as made:
        yield made


def stage(host: Host, name: str, zero: int, steps: int):
    """Start a stage on the host and the other one; what it says is in NAME.out of the shared folder."""
    words = ("-m", "tests.hosts.stage", host.folder / name, zero, steps, host.folder / "hostfile")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return host.start(sys.executable, *words, out=host.folder / f"{name}.out", env=environment)


def assert_trained(folder: Path, steps: int, alone: Path) -> None:
    """The weights are those of the same stage in this process."""
    rows, recipe = SFT
    expected, _ = trained(alone, (rows, replace(recipe, steps=steps)), Launch())
    found = load_file(folder / "weights.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=TOLERANCE)


def test_a_host_that_is_lost_ends_the_stage_and_the_same_command_goes_on(
    hosts: Hosts, tmp_path: Path
) -> None:
    """Its power goes: it says nothing, and its peers, who would wait for half an hour, are ended in its stead.

    At the end the weights are those of one process that was left alone.
    """
    folder, steps = hosts.shared / "lost", 20
    job = stage(hosts["alpha"], "lost", 2, steps)
    until = time.monotonic() + 200
    while not [*folder.glob("stages/*.work/checkpoint-4")] and time.monotonic() < until:
        assert job.poll() is None, folder.with_suffix(".out").read_text()
        time.sleep(0.1)
    hosts["beta"].switch_off()
    assert job.wait(10 * SILENCE) == 1
    said = folder.with_suffix(".out").read_text()
    assert f"process 1 on beta has not been heard of for {SILENCE:g} seconds" in said
    assert not hosts["alpha"].processes("cl_graft.training.job"), "no process is left"
    kept = [int(f.name.rpartition("-")[2]) for f in folder.glob("stages/*.work/checkpoint-*")]
    assert kept and max(kept) < steps

    hosts.boot("beta")
    assert stage(hosts["alpha"], "lost", 2, steps).wait(300) == 0
    assert_trained(folder, steps, tmp_path)
