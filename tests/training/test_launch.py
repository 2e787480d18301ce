"""Stages as jobs of two processes under DeepSpeed: the same as in one, and nothing lost when one dies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from cl_graft.config import Launch
from cl_graft.errors import CLGraftError, Diverged
from cl_graft.models.load import load
from cl_graft.store.files import read_jsonl
from cl_graft.task import Example, Pair, Preference, Task, Training
from cl_graft.training import launch as launching
from cl_graft.training.checkpoint import freeze
from cl_graft.training.config import accumulation, dpo_job, sft_job
from cl_graft.training.fit import LOG
from cl_graft.training.launch import StageFailed, command, slots, surroundings
from cl_graft.training.stages import Stages
from cl_graft.training.zero import zero_json
from tests.refusals import one_sentence

EXAMPLES = [Example(f"Q: Copy ab{c}.\nA: ", f"ab{c}") for c in "cdefghij"]
PAIRS = [Pair(e.prompt, e.completion, "zz") for e in EXAMPLES]
PAIRS[0] = Pair("a long line. " * 8 + PAIRS[0].prompt, "abc", "zzz")  # alone longer than max_length
RECIPE = Training(steps=8, batch=4, learning_rate=1e-3)
SFT = sft_job(Task("t", EXAMPLES, (), "exact", training=RECIPE), 0)
HALF = Preference(steps=8, batch=4, learning_rate=1e-3)
DPO = dpo_job(
    Task("t", (), (), "exact", training=replace(RECIPE, max_length=64, preference=HALF)), PAIRS, 0
)

# Float32 sums in another order: a few units of the last place of weights of size 0.1, after eight steps.
TOLERANCE = 1e-6

SSH = """#!/bin/sh
# to this machine, without a server
while [ "$1" = -o ]; do shift 2; done
shift
exec "$@"
"""


def wrapped(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def trained(folder, job, launch, wrap=lambda model: model, progress=lambda done, at: None):
    """{parameter: tensor} and log after the stage."""
    model, tokenizer = load("nano-llama")
    model = wrap(model)
    _, log = Stages(folder, launch).run(model, tokenizer, *job, progress=progress)
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".ref." not in n}, log


def assert_same(one, other):
    weights, log = one
    theirs, their_log = other
    assert weights.keys() == theirs.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], theirs[name], rtol=0, atol=TOLERANCE)
    assert [x["step"] for x in log.losses] == [x["step"] for x in their_log.losses]
    for x, y in zip(log.losses, their_log.losses, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)


def assert_read_back(folder, trained):
    """The one stage in the folder holds these weights."""
    (marker,) = folder.glob("stages/*/stage.json")
    loaded, _ = load(str(marker.parent))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[0][name]), name


class TestTwoProcesses:
    pytestmark = pytest.mark.slow

    @pytest.mark.parametrize(
        ("job", "zero", "held"),
        [(SFT, 3, ["model.embed_tokens.weight"]), (DPO, 2, ["lm_head.weight"])],
        ids=["sft-3-frozen", "dpo-2-frozen"],
    )
    def test_train_what_one_trains(self, tmp_path, monkeypatch, job, zero, held):
        """ZeRO-2 and ZeRO-3, gathered, saved and read back, against the stage in this process; DPO under ZeRO-3 below.

        held: parameters that are frozen; they stay bit for bit. Nothing is compiled for it.
        """
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))

        def holding(model):
            freeze(model, held)
            return model

        alone = trained(tmp_path / "one", job, Launch(), holding)
        how = Launch(processes=2, zero=zero, micro_batch=1)
        together = trained(tmp_path / "two", job, how, holding)
        assert_same(together, alone)
        assert not (tmp_path / "compiled").exists()
        start = dict(load("nano-llama")[0].named_parameters())
        assert [n for n, x in together[0].items() if x.equal(start[n])] == held
        assert_read_back(tmp_path / "two", together)

    def test_train_an_adapter_with_offload(self, tmp_path):
        alone = trained(tmp_path / "one", DPO, Launch(), wrapped)
        how = Launch(processes=2, zero=3, offload=True, checkpointing=True)
        assert_same(trained(tmp_path / "two", DPO, how, wrapped), alone)

    def test_lose_nothing_when_one_dies(self, tmp_path):
        """Killed in the middle; the sentence says so, no process is left, and the next run goes on, to the same end."""
        how = Launch(processes=2, zero=2, save_steps=2, micro_batch=1)
        rows, recipe = SFT
        job = (rows, replace(recipe, steps=24))  # not done before they are seen to have begun

        def kill(done, at):
            if done >= 4 / 24:
                workers = [p for p in psutil.Process().children(recursive=True) if is_worker(p)]
                if workers:
                    workers[-1].kill()

        with pytest.raises(StageFailed, match="killed by SIGKILL.*goes on from the last"):
            trained(tmp_path / "two", job, how, progress=kill)
        assert not [p for p in psutil.Process().children(recursive=True) if is_worker(p)]
        (work,) = tmp_path.glob("two/stages/*.work")
        before = list(read_jsonl(work / LOG))
        after = trained(tmp_path / "two", job, how)
        assert after[1].losses[:2] == before[:2], "the first steps are not done again"
        assert_same(after, trained(tmp_path / "one", job, Launch()))
        assert_read_back(tmp_path / "two", after)

    @pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
    def test_end_with_the_process_that_started_them(self, tmp_path, monkeypatch, launcher):
        """By the end of their standard input, or on several nodes by the silence of a file that all of them see."""
        hosts = None
        if launcher == "deepspeed":
            (tmp_path / "hosts").write_text("localhost slots=2\n")
            (tmp_path / "ssh").write_text(SSH)
            (tmp_path / "ssh").chmod(0o755)
            monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            hosts = str(tmp_path / "hosts")
        program = textwrap.dedent(f"""
            from pathlib import Path
            from cl_graft.config import Launch
            from cl_graft.models.load import load
            from cl_graft.training.config import StageConfig
            from cl_graft.training import launch
            from cl_graft.training.stages import Stages
            launch.SILENCE = 8.0
            rows = [dict(prompt="Q: Copy ab.", completion="ab")] * 4
            job = StageConfig("sft", 2000, 4, 1e-4, 0.1, 0.0, 64, 0)
            stages = Stages(Path({str(tmp_path)!r}), Launch(processes=2, hostfile={hosts!r}))
            stages.run(*load("nano-llama"), rows, job, lambda done, at: print(done, flush=True))
        """)
        (tmp_path / "p.py").write_text(program)
        harness = subprocess.Popen(
            [sys.executable, tmp_path / "p.py"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert harness.stdout is not None
            assert float(harness.stdout.readline()) < 1, "it trains"
            children = psutil.Process(harness.pid).children(recursive=True)
            assert len([p for p in children if is_worker(p)]) == 2
            time.sleep(10 if hosts else 0)
            assert harness.poll() is None, "it trains on while it is waited for"
        finally:
            harness.kill()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive

    def test_say_where_training_diverged(self, tmp_path):
        """As one process does; nothing is left that would be gone on from."""
        rows, config = SFT
        job = rows, replace(config, learning_rate=1e5)
        said = one_sentence(lambda: trained(tmp_path, job, Launch(processes=2, zero=2)), Diverged)
        assert re.search(r"diverged in step \d of 8 .* at a learning rate of 100000", said)
        assert {p.suffix for p in (tmp_path / "stages").iterdir()} <= {".lock", ".used"}

    def test_say_why_they_failed(self, tmp_path, monkeypatch):
        """An error in the job is told in the words of the process that met it."""
        monkeypatch.setattr(
            launching.checkpoint, "save_start", lambda model, tokenizer, folder: folder.mkdir()
        )
        with pytest.raises(StageFailed, match=r"process \d: \w+Error: .*tokenizer.*job\.out"):
            trained(tmp_path, SFT, Launch(processes=2))


def test_a_launcher_that_ends_well_without_a_result_is_a_failure(tmp_path):
    """DeepSpeed's own does where a process was killed."""

    def wait(words):
        nobody = launching.Ear(tmp_path, 0)
        launching._wait(tmp_path, words, {}, "", 1, lambda *_: None, nobody)

    with pytest.raises(StageFailed, match=r"\(it ended before it was done\)"):
        wait([sys.executable, "-c", ""])
    with pytest.raises(StageFailed, match=r"\(exit code 3: no host answers\)"):
        words = "import sys; print('no host answers'); sys.exit(3)"
        wait([sys.executable, "-c", words])


def is_worker(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_the_batch_is_held_or_the_launch_refused():
    assert accumulation(128, Launch(processes=8, micro_batch=4)) == (4, 4)
    assert accumulation(128, Launch(processes=8)) == (16, 1)
    assert accumulation(12, Launch(micro_batch=3)) == (3, 4)
    for batch, how in ((128, Launch(processes=6)), (8, Launch(processes=2, micro_batch=3))):
        with pytest.raises(CLGraftError, match=f"cannot make a batch of {batch}"):
            accumulation(batch, how)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_deepspeeds_own_parser_takes_the_json(zero, offload, on_gpu):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = replace(SFT[1], batch=128)
    found = zero_json(
        config, Launch(processes=8, zero=zero, offload=offload, micro_batch=2), on_gpu
    )
    parsed = DeepSpeedZeroConfig(**found["zero_optimization"])
    assert parsed.stage == zero
    assert (parsed.offload_optimizer is not None) == offload
    micro, steps = found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]
    assert micro * steps * 8 == found["train_batch_size"] == 128
    assert found["bf16"]["enabled"] == on_gpu


def test_one_node_is_started_by_torchrun_and_several_by_deepspeed(tmp_path):
    one = command(Launch(processes=4), tmp_path)
    assert one[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--nproc_per_node=4" in one and one[-2:] == ["cl_graft.training.job", str(tmp_path)]
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\na slots=8\nb slots=8\n\n")
    assert slots(hosts) == 16
    several = command(Launch(processes=16, hostfile=hosts), tmp_path)
    assert several[2] == "deepspeed.launcher.runner" and str(hosts) in several
    # DeepSpeed's own reading of that command line and of the file
    from deepspeed.launcher import runner

    parsed = runner.parse_args(several[3:])
    assert (parsed.user_script, parsed.module, parsed.no_local_rank) == (one[-2], True, True)
    assert runner.fetch_hostfile(parsed.hostfile) == {"a": 8, "b": 8}


def test_a_hostfile_that_cannot_be_meant_is_refused(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb: 8\n")
    with pytest.raises(CLGraftError, match="line 2 is 'b: 8'; write"):
        slots(hosts)
    with pytest.raises(CLGraftError, match="cannot be read"):
        slots(tmp_path / "none")
    hosts.write_text("a slots=8\n")
    with pytest.raises(CLGraftError, match="8 slots and the launch 4 processes"):
        launching.check(Launch(processes=4, hostfile=hosts))


def test_processes_find_the_package_again():
    paths = surroundings()["PYTHONPATH"].split(os.pathsep)
    assert str(Path(launching.__file__).parents[2]) in paths
