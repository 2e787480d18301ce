"""A stage as a job of several processes under DeepSpeed: by torchrun on one machine, by DeepSpeed on several."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cl_graft.config import Launch
from cl_graft.errors import CLGraftError, Diverged
from cl_graft.models.spread import in_host_memory
from cl_graft.processes import signal_name
from cl_graft.store.files import RecordError, read_jsonl, write_json
from cl_graft.training import checkpoint
from cl_graft.training.config import Row, StageConfig, accumulation, at_step
from cl_graft.training.fit import LOG, Progress, quiet
from cl_graft.training.flat import flattens
from cl_graft.training.term import Term, save
from cl_graft.training.tokens import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIVERGED = "diverged"  # says why there is nothing to go on from
FAILED = "failed-"  # with the rank of the process that says why
DONE = "done"  # the last that a job writes: DeepSpeed's launcher may end well though a process was killed
ALIVE = "alive"  # renewed while whoever started the job waits for it
HEARD = (
    "heard-"  # with the rank of a process on one of several nodes, which renews it while it lives
)
SILENCE = 120.0  # seconds without that, after which the processes of other nodes end, or the job counts as lost
GRACE = 15.0  # seconds that processes have to end by themselves


class StageFailed(CLGraftError):
    """A launched job that did not come to its end."""


def launched(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    config: StageConfig,
    launch: Launch,
    work: Path,
    out: Path,
    progress: Progress,
    terms: Sequence[Term] = (),
) -> None:
    """Run the stage as a job and wait for it; the checkpoint is in `out`, step checkpoints and logs in `work`.

    The model's weights stay where they are, but off the accelerator meanwhile. Several nodes must see `work` and
    `out` under the same path. Raises StageFailed, in one sentence, if any process fails, or
    Diverged.
    """
    from datasets import Dataset

    check(launch)
    accumulation(config.batch, launch)
    ends = work / DIVERGED, work / DONE
    for left in (*work.glob(f"{FAILED}*"), *work.glob(f"{HEARD}*"), *ends):
        left.unlink(missing_ok=True)
    token, environment = secrets.token_hex(8), surroundings()
    (work / ALIVE).write_text(token)
    checkpoint.save_start(model, tokenizer, work / "start")
    with quiet():
        Dataset.from_list(tokens(tokenizer, rows, config)).save_to_disk(str(work / "rows"))
    shutil.rmtree(work / "terms", ignore_errors=True)
    save(terms, work / "terms")
    job = {
        "config": asdict(config),
        "launch": launch.model_dump(mode="json"),
        "out": str(out.absolute()),
        "frozen": checkpoint.frozen(model),
        "flat": flattens(model),  # which a process that holds a part of it cannot tell
        "threads": torch.get_num_threads(),
        "token": token,
        "silence": SILENCE,
    }
    write_json(work / "job.json", job)
    ear = Ear(work, launch.processes if launch.hostfile else 0)
    with in_host_memory(model):
        _wait(work, command(launch, work), environment, token, config.steps, progress, ear)


def check(launch: Launch) -> None:
    """Raises CLGraftError for what can be seen not to work before anything is started."""
    if find_spec("deepspeed") is None:
        raise CLGraftError(
            "launching a stage needs DeepSpeed; install it with `pip install cl-graft[deepspeed]`."
        )
    gpus = torch.cuda.device_count()
    if launch.hostfile is None and gpus and launch.processes > gpus:
        raise CLGraftError(
            f"{launch.processes} processes need as many GPUs and this machine has {gpus}; "
            "choose fewer or name a hostfile."
        )
    if launch.hostfile is not None and slots(launch.hostfile) != launch.processes:
        raise CLGraftError(
            f"{launch.hostfile} has {slots(launch.hostfile)} slots and the launch {launch.processes} processes; "
            "make them equal."
        )


def slots(hostfile: Path) -> int:
    """Devices that the hostfile promises: the sum of its `host slots=N` lines. Raises CLGraftError."""
    try:
        lines = [line.split("#")[0].strip() for line in hostfile.read_text().splitlines()]
    except OSError as error:
        raise CLGraftError(f"{hostfile} cannot be read ({error.strerror}).") from error
    count = 0
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"\S+\s+slots=(\d+)", line)
        if line and not match:
            raise CLGraftError(
                f"{hostfile}, line {number} is {line!r}; write a host and its devices as `host slots=8`."
            )
        count += int(match[1]) if match else 0
    return count


def command(launch: Launch, work: Path) -> list[str]:
    """The command that starts the processes."""
    module = ["cl_graft.training.job", str(work.absolute())]
    if launch.hostfile is None:
        each = ["--standalone", f"--nproc_per_node={launch.processes}", "--module"]
        return [sys.executable, "-m", "torch.distributed.run", *each, *module]
    nodes = ["--hostfile", str(launch.hostfile.absolute()), "--no_local_rank", "--module"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *nodes, *module]


def surroundings() -> dict[str, str]:
    """Environment of the processes: this one's, and where the package is found."""
    source = str(Path(__file__).resolve().parents[2])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


class Ear:
    """What is heard of the processes on several nodes: each renews the text of a file that all nodes see."""

    def __init__(self, work: Path, processes: int):
        self.files = {rank: work / f"{HEARD}{rank}" for rank in range(processes)}
        self.said: dict[int, str] = {}
        self.when: dict[int, float] = {}

    def silent(self) -> str:
        """Which process has not been heard of for so long that its node must be lost, or nothing.

        The clock of those that never spoke begins with the first that did.
        """
        now = time.monotonic()
        for rank, file in self.files.items():
            with suppress(OSError):
                text = file.read_text()
                if text and text != self.said.get(rank):
                    self.said[rank], self.when[rank] = text, now
        if not self.when:
            return ""
        for rank in self.files:
            if now - self.when.setdefault(rank, now) > SILENCE:
                where = f" on {self.said[rank].split()[0]}" if rank in self.said else ""
                return f"process {rank}{where} has not been heard of for {SILENCE:g} seconds"
        return ""


def _wait(
    work: Path,
    command: list[str],
    env: dict[str, str],
    token: str,
    steps: int,
    progress: Progress,
    ear: Ear,
) -> None:
    lost = ""
    with open(work / "job.out", "wb") as out:
        job = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # whose end tells the processes that this one is gone
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    try:
        for count in itertools.count():
            if job.poll() is not None:
                break
            time.sleep(0.2)
            if count % 25 == 0:
                (work / ALIVE).write_text(f"{token} {count}")
                if lost := ear.silent():
                    break
            with suppress(RecordError, IndexError):
                last = [*read_jsonl(work / LOG)][-1]
                progress(last["step"] / steps, at_step(last["step"], steps, last["loss"]))
    finally:
        _end(job)
    if (work / DIVERGED).exists():
        raise Diverged((work / DIVERGED).read_text())
    if job.returncode or not (work / DONE).exists():
        raise StageFailed(
            f"the training job failed ({lost or _reason(work, job.returncode)}); what the processes said is in "
            f"{work / 'job.out'}, and the same command goes on from the last checkpoint."
        )


def _end(job: subprocess.Popen) -> None:
    """End the job, so that no process of it is left."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if job.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signum)
            with suppress(subprocess.TimeoutExpired):
                job.wait(GRACE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(job.pid, signal.SIGKILL)  # of those that torchrun may have left
    if job.stdin:
        with suppress(OSError):
            job.stdin.close()


def _reason(work: Path, code: int) -> str:
    """How the process that failed first died, or what it said: the others fail or are ended because of it."""
    said = (work / "job.out").read_text(errors="replace")
    codes = [int(number) for number in re.findall(r"exitcode\s*:\s*(-\d+)", said)]
    killed = [c for c in codes if c not in (-signal.SIGTERM, -signal.SIGABRT)]
    if killed:
        return f"a process was killed by {signal_name(-killed[0])}"
    told = sorted(work.glob(f"{FAILED}*"), key=lambda f: f.stat().st_mtime)
    if told:
        rank = told[0].name.removeprefix(FAILED)
        return f"process {rank}: {told[0].read_text().splitlines()[0]}"
    if not code:
        return "it ended before it was done"
    last = said.strip().rpartition("\n")[2].strip().rstrip(".")
    return f"exit code {code}: {last}" if last else f"exit code {code}"
