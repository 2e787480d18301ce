"""A sweep on a Ray cluster of hosts: one is lost, one is added; by a shared folder, and by a mirror without one."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_graft.experiment.cell import run
from cl_graft.sweep_config import Sweep
from tests.hosts.network import Host, Hosts, lacking

pytest.importorskip("ray", reason="Ray is not installed")
reason = lacking()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason), reason=reason)]

TOKEN = "0123456789abcdef" * 4
ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(sys.executable).with_name("ray"))
RAY = {"address": "10.99.7.1:6379", "cpus": 1}

# Trains like `individual`; which host does what is decided by notes that hosts leave in the shared folder.
STRATEGY = '''
import socket
import time
from pathlib import Path

from cl_graft import Strategy


class noted(Strategy):
    def learn(self, task, context, *, notes: str = ""):
        """notes: where each host says that it was here; beta stays for ever, alpha until gamma has come."""
        here, notes = socket.gethostname(), Path(notes)
        (notes / here).touch()
        while here == "beta" or (here == "alpha" and not (notes / "gamma").exists()):
            time.sleep(0.1)
        return context.dense(self.fine_tune(task, context))
'''


def environment(shared: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        # Ray's head asks for a token once one was ever made in the home folder, and a node that joins is not told
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_health_check_period_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
    }


def join(host: Host, head: bool = False) -> None:
    """Start Ray's processes of a host, with room for one cell."""
    where = ["--head", "--port=6379"] if head else [f"--address={RAY['address']}"]
    few = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
    small = ["--include-dashboard=false"] if head else []
    words = [PROGRAM, "start", *where, f"--node-ip-address={host.address}", *few, *small]
    done = host.run(*words, env=environment(host.folder))
    assert done.returncode == 0, done.stdout


def write_sweep(
    folder: Path, name: str, strategy: str, options: dict[str, Any], **more: Any
) -> Path:
    small = {"tasks": "math", "train_size": 16, "test_size": 4, "steps": 4, "batch": 4}
    asked = {
        "scenarios": {"mini": small},
        "strategies": {strategy: options} if options else [strategy],
        "models": ["nano-llama"],
        "budgets": ["200%"],
        "wandb": "off",
        **more,
    }
    (folder / name).write_text(yaml.safe_dump(asked))
    return folder / name


def sweep(host: Host, file: Path):
    out = file.with_suffix(".log")
    words = (sys.executable, "-m", "cl_graft", "sweep", file)
    return host.start(*words, out=out, env=environment(host.folder))


def run_here(file: Path, out: Path) -> None:
    """Run the cells of a sweep's file in this process, which is on no host."""
    asked = yaml.safe_load(file.read_text()) | {"out": out, "executor": "local"}
    for config in Sweep(**{k: v for k, v in asked.items() if k not in ("ray", "mirror")}).cells():
        run(config)


def matrices(out: Path) -> dict[int, Any]:
    """{seed: matrix} of the finished cells in a folder of results."""
    found = [json.loads(file.read_text()) for file in sorted(out.glob("*/result.json"))]
    assert all(result["complete"] for result in found)
    return {result["config"]["seed"]: result["matrix"] for result in found}


def wait_for(file: Path, job: Any, log: Path) -> None:
    until = time.monotonic() + 240
    while not file.exists():
        said = log.read_text()
        assert job.poll() is None and time.monotonic() < until, said
        time.sleep(0.1)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Alpha, the head, and beta. In the shared folder, each has a folder `own` of its own."""
    folder = tmp_path_factory.mktemp("hosts")
    with Hosts(folder, private=[folder / "own"]) as made:
        join(made["alpha"], head=True)
        join(made["beta"])
        yield made


def test_hosts_that_share_no_folder_meet_at_the_mirror(hosts: Hosts) -> None:
    """Each host has an empty `out` of its own; what the other computed comes by the mirror's URL."""
    folder = hosts.shared
    own = folder / "own"
    asked = {"seeds": [0, 1], "executor": "ray", "ray": RAY, "workers": 2}
    asked |= {"mirror": f"file://{folder}/mirror", "out": str(own / "out")}
    file = write_sweep(folder, "mirror.yaml", "individual", {}, **asked)
    assert sweep(hosts["alpha"], file).wait(400) == 0, file.with_suffix(".log").read_text()
    hosts["alpha"].run("cp", "-r", own / "out", folder / "fetched")
    theirs = hosts["beta"].run("find", own, "-name", "pack*", "-o", "-name", "result.json").stdout
    assert theirs.strip(), "beta computed, too"
    run_here(file, folder / "one")
    assert matrices(folder / "fetched") == matrices(folder / "one")


def test_who_lacks_the_token_of_the_head_is_told(hosts: Hosts) -> None:
    out = str(hosts.shared / "out")
    file = write_sweep(
        hosts.shared, "token.yaml", "individual", {}, executor="ray", ray=RAY, out=out
    )
    other = environment(hosts.shared) | {
        "RAY_AUTH_TOKEN": TOKEN[::-1],
        "RAY_gcs_rpc_server_connect_timeout_s": "1",
    }
    done = hosts["alpha"].run(sys.executable, "-m", "cl_graft", "sweep", file, env=other)
    assert done.returncode == 1
    assert (
        done.stdout.rstrip()
        .split("\n")[-1]
        .startswith("error: the Ray cluster at 10.99.7.1:6379 does not take")
    )
    assert "RAY_AUTH_TOKEN" in done.stdout and "Traceback" not in done.stdout


def test_a_host_is_lost_and_another_comes_in_the_middle_of_a_sweep(hosts: Hosts) -> None:
    """The last that these hosts go through: beta stays off."""
    folder = hosts.shared
    notes = folder / "notes"
    notes.mkdir()
    (folder / "noted.py").write_text(STRATEGY)
    asked = {"seeds": [0, 1], "executor": "ray", "ray": RAY, "workers": 2}
    asked |= {"out": str(folder / "many")}
    noted = str(folder / "noted.py")
    file = write_sweep(folder, "many.yaml", noted, {"notes": str(notes)}, **asked)
    job = sweep(hosts["alpha"], file)
    wait_for(notes / "beta", job, file.with_suffix(".log"))
    wait_for(notes / "alpha", job, file.with_suffix(".log"))
    hosts["beta"].switch_off()
    join(hosts.boot("gamma"))
    assert job.wait(400) == 0, file.with_suffix(".log").read_text()
    assert (notes / "gamma").exists()
    run_here(file, folder / "alone")
    assert matrices(folder / "many") == matrices(folder / "alone")
