"""Cells as tasks of a Ray cluster, or of one that is started on this machine.

A task asks for CPUs, GPUs and memory; Ray finds it a node, and sets the GPUs it may see. A cell whose node is lost is
given to another, which goes on from what the first left: in the shared results folder, or at the `mirror` URL.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError, first_line
from cl_graft.experiment.attempt import attempt, seldom
from cl_graft.experiment.executors import WAITS, Executor, Outcome, Report, Work
from cl_graft.experiment.queue import Queue
from cl_graft.store.digests import forget_peak_memory

if TYPE_CHECKING:
    from cl_graft.sweep_config import Ray, Sweep

LOST = Outcome("lost", "its node was lost.")


def executor(asked: Sweep, cells: Sequence[RunConfig]) -> Executor:
    """A cluster from which each cell takes what the sweep asks for."""
    return partial(run_cells, workers=asked.workers, asks=asked.ray)


def run_cells(
    cells: Sequence[RunConfig], report: Report, workers: int, asks: Ray, work: Work = attempt
) -> Iterator[tuple[RunConfig, Outcome]]:
    """Outcomes as they come; workers: the most cells at a time, 0 as many as the cluster has room for.

    Raises CLGraftError where Ray is not installed, cannot be reached, or never has what a cell asks for.
    """
    ray = _connected(asks, workers)
    from ray.util.queue import Queue as Events
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    wants = {"num_cpus": asks.cpus, "num_gpus": asks.gpus, "memory": asks.memory}
    task = ray.remote(**wants, max_retries=0)(_work)  # the queue tries again, and knows how often
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    events: Any = Events(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    left, running, places = Queue(cells), dict[Any, RunConfig](), dict[str, str]()
    try:
        while True:
            slots = workers or max(1, _room(ray, asks))  # without a node Ray waits for one
            while len(running) < slots and (chosen := left.next()):
                config, patient = chosen
                running[
                    task.remote(work, config.model_dump_json(), patient, events, os.getcwd())
                ] = config
            if not running:
                return
            ray.wait(list(running), timeout=0.5)
            if count := events.qsize():  # asking an empty one costs an exception from afar
                for place, *event in events.get_nowait_batch(count):
                    places[event[0]] = place
                    report(*event)
            ended = {*ray.wait(list(running), num_returns=len(running), timeout=0)[0]}
            for reference in ended | _lost(ray, running, places):
                config = running.pop(reference)
                places.pop(config.cell, None)
                outcome = _outcome(ray, reference) if reference in ended else LOST
                if final := left.after(config, outcome):
                    yield config, final
                else:
                    report(config.cell, WAITS[outcome.state], 0.0)
    except ray.exceptions.RayError as error:
        raise CLGraftError(
            f"the Ray cluster was lost ({_told(error)}); what is finished is kept, and the same command goes on where "
            "a cluster is up."
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        events.shutdown(force=True)


def _connected(asks: Ray, workers: int) -> Any:
    try:
        import ray
    except ImportError as error:
        raise CLGraftError("Ray is not installed; `pip install cl-graft[ray]`.") from error
    if not ray.is_initialized():
        address = asks.address or os.environ.get("RAY_ADDRESS")
        here: dict[str, Any] = {"address": address}
        if not address:  # one of our own, even where another's is running
            here = {"address": "local", "num_cpus": math.ceil(workers * asks.cpus) or None}
        try:
            _reach(address)  # Ray itself would try for minutes
        except OSError as error:
            raise CLGraftError(
                f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`."
            ) from error
        try:
            ray.init(
                **here, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise CLGraftError(
                f"the Ray cluster at {address or 'this machine'} does not take this process ({_told(error)}); run the "
                "same versions of Ray and Python as its head and, where that asks for a token, set RAY_AUTH_MODE=token "
                "and RAY_AUTH_TOKEN to what `ray get-auth-token` prints there."
            ) from error
    if not _room(ray, asks):
        has = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU", "memory")}
        raise CLGraftError(
            f"a cell asks for {asks.cpus:g} CPUs, {asks.gpus:g} GPUs and {asks.memory or 0:,} bytes, and the cluster "
            f"has {has}; ask for less."
        )
    return ray


def _reach(address: str | None) -> None:
    """Raises OSError where nothing listens at `host:port`."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _room(ray: Any, asks: Ray) -> int:
    """How many cells the cluster's nodes hold at a time."""
    wants = {"CPU": asks.cpus, "GPU": asks.gpus, "memory": asks.memory or 0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        min(int(node.get(kind, 0) // amount) for kind, amount in wants.items() if amount)
        for node in nodes
    )


def _outcome(ray: Any, reference: Any) -> Outcome:
    try:
        return Outcome(*ray.get(reference))
    except ray.exceptions.RayError as error:
        return Outcome("lost", f"its node or process was lost ({_told(error)}).")


def _told(error: Exception) -> str:
    """An error of Ray's in a few words: what follows its first line is for Ray's developers."""
    reason = first_line(error)
    return f"{type(error).__name__}: {reason}"


def _lost(ray: Any, running: Mapping[Any, RunConfig], places: Mapping[str, str]) -> set[Any]:
    """Cells at nodes that the cluster takes for dead.

    Of a host whose power went Ray (2.60) knows within a minute, but it waits for the answers of its tasks for several
    more.
    """
    dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    found = {r for r, config in running.items() if places.get(config.cell) in dead}
    for reference in found:
        ray.cancel(reference, force=True)
    return found


def _work(work: Work, config: str, patient: bool, events: Any, folder: str) -> tuple[Any, ...]:
    """Attempt the cell on a node; plain values go back.

    folder: where the sweep was started, which relative paths begin from if the node has it, too.
    """
    if os.path.isdir(folder):
        os.chdir(folder)
    import ray

    made, place = RunConfig.model_validate_json(config), ray.get_runtime_context().get_node_id()
    forget_peak_memory()  # Ray gives one process to several cells
    os.environ["OMP_NUM_THREADS"] = str(made.threads)

    def report(what: str, done: float, at: str = "") -> None:
        # not waited for, and so no failure of the cell where nobody listens any more
        events.actor.put_nowait.remote((place, made.cell, what, done, at))

    report("beginning", 0.0)
    outcome = work(made, seldom(report, 1.0), patient)
    return outcome.state, outcome.reason, outcome.trace
