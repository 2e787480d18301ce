"""Cells as tasks of a Ray cluster on this machine: two nodes, one of which is lost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError
from cl_graft.experiment.executors import ray as executor
from cl_graft.experiment.executors.ray import run_cells
from cl_graft.sweep_config import Ray
from tests.hosts.network import lacking

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow

SLOW = """
import time
from pathlib import Path
from cl_graft import Strategy


class slow(Strategy):
    def learn(self, task, context, *, seconds: float = 0.0, mark: str = ""):
        if mark and not Path(mark).exists():
            import ray

            Path(mark).write_text(ray.get_runtime_context().get_node_id())
            time.sleep(600)
        time.sleep(seconds)
        return {}
"""


@pytest.fixture
def strategy(tmp_path: Path) -> str:
    (tmp_path / "slow.py").write_text(SLOW)
    return str(tmp_path / "slow.py")


def cells(strategy: str, out: Path, count: int, **options: Any) -> list[RunConfig]:
    small = {"tasks": "math", "train_size": 16, "test_size": 4, "steps": 2}
    return [
        RunConfig(
            scenario="mini",
            strategy=strategy,
            model="nano-llama",
            seed=seed,
            out=out,
            wandb="off",
            options={"mini": small, "slow": options},
        )
        for seed in range(count)
    ]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One for all tests, with a head that computes nothing and one node; its processes import everything once."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        made.add_node(num_cpus=1)
        ray.init(made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def states(found: Any) -> list[str]:
    return [outcome.state for _, outcome in found]


def test_a_cluster_of_our_own_has_what_so_many_workers_ask_for(
    strategy: str, tmp_path: Path
) -> None:
    """Before the other tests, which are connected to a cluster already."""
    try:
        made = cells(strategy, tmp_path / "out", 1)
        assert states(run_cells(made, lambda *_: None, 1, Ray(cpus=3))) == ["done"]
    finally:
        ray.shutdown()


def test_nobody_answers(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(CLGraftError, match="no Ray cluster answers at 127.0.0.1:1 .*refused"):
        list(run_cells(cells(strategy, tmp_path, 1), print, 0, Ray(address="127.0.0.1:1")))


@pytest.mark.skipif(not lacking(), reason="real hosts can be made here: tests/hosts/test_ray.py")
def test_the_cells_of_a_lost_node_go_on_at_another(
    strategy: str, tmp_path: Path, cluster: Any
) -> None:
    """The node dies while the cell's task is under way, when the base model is measured already."""
    cluster.add_node(num_cpus=1)
    nodes = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    mark = tmp_path / "mark"
    (config,) = cells(strategy, tmp_path / "out", 1, mark=str(mark))
    heard: list[str] = []

    def kill_its_node() -> None:
        while not mark.exists() or not mark.read_text():
            time.sleep(0.1)
        (lost,) = [node for node in nodes if node.node_id == mark.read_text()]
        cluster.remove_node(lost, allow_graceful=False)

    threading.Thread(target=kill_its_node, daemon=True).start()
    found = run_cells([config], lambda cell, what, done, at="": heard.append(what), 1, Ray())
    assert states(found) == ["done"]
    result = json.loads((tmp_path / "out" / config.cell / "result.json").read_text())
    assert result["complete"]
    assert heard.count("loading the model") == 2
    assert heard.count("evaluating the base model") == 1, "what was whole is not done again"


def test_a_cluster_that_has_no_node_for_a_moment_loses_no_cell(
    strategy: str, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = iter([1])  # when it is first asked
    monkeypatch.setattr(executor, "_room", lambda *_: next(rooms, 0))
    made = cells(strategy, tmp_path / "out", 2)
    assert states(run_cells(made, lambda *_: None, 0, Ray())) == ["done", "done"]


def test_what_the_cluster_never_has_is_refused(strategy: str, tmp_path: Path, cluster: Any) -> None:
    made = cells(strategy, tmp_path, 1)
    with pytest.raises(CLGraftError, match="asks for 1 CPUs, 4 GPUs.*ask for less"):
        list(run_cells(made, lambda *_: None, 0, Ray(gpus=4)))


def test_a_failing_cell_sends_its_traceback(strategy: str, tmp_path: Path, cluster: Any) -> None:
    (config,) = cells(strategy, tmp_path / "out", 1, seconds=-1.0)
    ((_, outcome),) = run_cells([config], lambda *_: None, 0, Ray())
    assert outcome.state == "failed" and "ValueError" in outcome.reason
    assert "slow.py" in outcome.trace
