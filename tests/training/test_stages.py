"""Training that is shared, or goes on after a kill, changes nothing but the time it takes."""

from __future__ import annotations

import errno
import itertools
import json
import re
import resource
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from cl_graft.config import Launch
from cl_graft.errors import CLGraftError
from cl_graft.models.load import load
from cl_graft.skillpack.format.file import fingerprint
from cl_graft.store.mirror import Mirror
from cl_graft.stream import benchmark
from cl_graft.task import Example, Pair, Preference, Task, Training
from cl_graft.training import fit, stages
from cl_graft.training.config import StageConfig, dpo_job, sft_job
from cl_graft.training.delta import Delta
from cl_graft.training.stages import Stages, in_full_precision, is_whole
from tests import kills

EXAMPLES = [Example(f"Q: Copy ab{c}.\nA: ", f"ab{c}") for c in "cdefghij"]
TASK = Task(
    "t", EXAMPLES, (), "exact", training=Training(steps=8, batch=4, preference=Preference())
)


def learn(strategy, scenario, folder, experiences=2):
    strategy.stages = Stages(folder)
    for experience in list(benchmark(scenario).train_stream)[:experiences]:
        strategy.train(experience, eval_streams=[])
    return strategy


def stages_in(folder):
    return sorted(p.parent.name for p in folder.glob("stages/*/stage.json"))


def adapted(model, rank=2):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def lines(log):
    """Those of a log, but for what depends on the machine."""
    aside = ("seconds", "tokens_per_second", "peak_memory_mb")
    return [{k: v for k, v in line.items() if k not in aside} for line in log.losses]


def no_training(*args, **kwargs):
    raise AssertionError("trained again")


def test_a_second_method_trains_nothing_and_gets_the_same_delta(
    build, tiny_scenario, tmp_path, monkeypatch
):
    alone = learn(build("graftllm", calibration_batches=1), tiny_scenario, tmp_path / "alone")
    learn(build("individual"), tiny_scenario, tmp_path / "shared")
    assert len(stages_in(tmp_path / "shared")) == 2
    monkeypatch.setattr(fit, "fit", no_training)
    ticks = itertools.count()
    monkeypatch.setattr(stages, "perf_counter", lambda: float(next(ticks)))
    shared = learn(build("graftllm", calibration_batches=1), tiny_scenario, tmp_path / "shared")
    assert [p.digest for p in shared.packs] == [p.digest for p in alone.packs]
    assert shared.seconds["train"] > 0
    assert shared.log.spent == 2, "no more than two locks"
    assert alone.log.spent > 0


def test_another_seed_recipe_or_start_is_another_stage(build, tiny_scenario, tmp_path):
    learn(build("individual"), tiny_scenario, tmp_path, 1)
    first = stages_in(tmp_path)
    learn(build("sequential"), tiny_scenario, tmp_path, 1)
    assert stages_in(tmp_path) == first, "the first task starts from the base for both"
    other = tiny_scenario.with_training(batch=4)
    learn(build("individual", scenario=other), other, tmp_path, 1)
    seeded = build("individual")
    seeded.seed = 1
    learn(seeded, tiny_scenario, tmp_path, 1)
    assert len(stages_in(tmp_path)) == 3


def test_a_stage_without_its_marker_is_trained_again(build, tiny_scenario, tmp_path):
    whole = learn(build("individual"), tiny_scenario, tmp_path, 1)
    (marker,) = tmp_path.glob("stages/*/stage.json")
    shutil.rmtree(marker.parent)
    again = learn(build("individual"), tiny_scenario, tmp_path, 1)
    assert again.packs[0].digest == whole.packs[0].digest and marker.is_file()


def test_a_stage_is_a_model_folder_that_transformers_loads(nano, tmp_path):
    model, tokenizer = nano
    folder, log = Stages(tmp_path).run(model, tokenizer, *sft_job(TASK, 0))
    loaded, _ = load(str(folder))
    for (name, mine), (_, theirs) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    about = json.loads((folder / "stage.json").read_text())
    assert about["weights"] == fingerprint(model.named_parameters())
    assert log.tokens == about["tokens"] > 0 and log.losses[-1]["step"] == 8
    assert not list(tmp_path.glob("stages/*.work"))


def test_the_delta_is_tuned_minus_start_parameter_by_parameter(nano, tmp_path):
    model, tokenizer = nano
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    folder, _ = Stages(tmp_path).run(model, tokenizer, *sft_job(TASK, 0))
    delta = Delta(folder, start, "cpu")
    assert list(delta) == list(start) and len(delta) == len(start)
    for name, parameter in model.named_parameters():
        assert torch.equal(delta[name], parameter.detach() - start[name])
    with pytest.raises(KeyError):
        delta["no.such.parameter"]


def test_an_adapter_trains_alone_and_is_recalled(nano, tmp_path, monkeypatch):
    """SFT, then DPO against the model with the adapter as SFT left it: the first margin is zero."""
    stages = Stages(tmp_path)
    pairs = [Pair(e.prompt, e.completion, "zz") for e in EXAMPLES]
    half = Preference(steps=4, batch=4, learning_rate=1e-3)
    jobs = (
        sft_job(replace(TASK, training=Training(steps=8, batch=4, learning_rate=1e-2)), 0),
        dpo_job(replace(TASK, training=Training(warmup=0.0, preference=half)), pairs, 0),
    )

    def trained():
        model, tokenizer = load("nano-llama")
        wrapped, logs = adapted(model), []
        for job in jobs:
            folder, log = stages.run(wrapped, tokenizer, *job)
            logs.append(log)
        state = {n: p.detach().clone() for n, p in wrapped.named_parameters() if ".default." in n}
        return folder, logs, state

    folder, logs, state = trained()
    assert logs[1].losses[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert {p.name for p in folder.iterdir()} >= {"adapter_model.safetensors", "stage.json"}
    assert any(x.abs().max() > 0 for n, x in state.items() if "lora_B" in n)
    monkeypatch.setattr(fit, "fit", no_training)
    again = trained()[2]
    assert all(torch.equal(again[n], x) for n, x in state.items())


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_stage_that_was_stopped_goes_on_from_its_last_whole_checkpoint(
    nano, tmp_path, monkeypatch, kind
):
    """Bit for bit the weights of the run that was not stopped; a torn checkpoint counts for nothing."""
    model, tokenizer = nano
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    pairs = [Pair(e.prompt, e.completion, "zz") for e in EXAMPLES]
    half = Preference(steps=8, batch=4, learning_rate=1e-3)
    job = (
        sft_job(TASK, 0)
        if kind == "sft"
        else dpo_job(replace(TASK, training=Training(preference=half)), pairs, 0)
    )

    def reset():
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])

    whole, _ = Stages(tmp_path / "whole").run(model, tokenizer, *job)
    wanted = fingerprint(model.named_parameters())
    reset()
    stages = Stages(tmp_path / "stopped", Launch(save_steps=2))

    def stop(done, at):
        if done >= 5 / 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run(model, tokenizer, *job, progress=stop)
    assert not stages_in(tmp_path / "stopped")
    (work,) = tmp_path.glob("stopped/stages/*.work")
    assert [p.name for p in work.glob("checkpoint-*")] == ["checkpoint-4"]
    shutil.copytree(work / "checkpoint-4", work / "checkpoint-5")
    (work / "checkpoint-5" / fit.WHOLE).unlink()
    (work / "checkpoint-5" / "model.safetensors").write_bytes(b"torn")
    reset()
    done = []
    _, log = stages.run(model, tokenizer, *job, progress=lambda fraction, at: done.append(fraction))
    assert done[0] == 5 / 8, "steps 1 to 4 are not done again"
    assert fingerprint(model.named_parameters()) == wanted
    assert [x["step"] for x in log.losses] == list(range(1, 9))
    assert lines(log) == lines(Stages(tmp_path).log(whole))
    assert not work.exists()


def test_a_line_of_the_log_is_the_same_mean_wherever_training_was_stopped(nano, tmp_path):
    """Two steps a line, and a checkpoint asked for after every third: it comes with the line."""
    model, tokenizer = nano
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    job = sft_job(replace(TASK, training=Training(steps=40, batch=1)), 0)
    whole, straight = Stages(tmp_path / "whole").run(model, tokenizer, *job)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(start[name])
    stages = Stages(tmp_path / "stopped", Launch(save_steps=3))

    def stop(done, at):
        if done >= 7 / 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run(model, tokenizer, *job, progress=stop)
    assert [f.name for f in tmp_path.glob("stopped/stages/*.work/checkpoint-*")] == ["checkpoint-6"]
    for name, parameter in model.named_parameters():
        parameter.data.copy_(start[name])
    _, log = stages.run(model, tokenizer, *job)
    assert lines(log) == lines(straight) and len(log.losses) == 20


def test_a_log_whose_lines_are_not_all_there_makes_no_stage(nano, tmp_path):
    model, tokenizer = nano
    folder, _ = Stages(tmp_path).run(model, tokenizer, *sft_job(TASK, 0))
    log = folder / fit.LOG
    whole = log.read_text()
    assert is_whole(folder)
    for cut in (whole[:-20], "".join(whole.splitlines(keepends=True)[:-1]), ""):
        log.write_text(cut)
        assert not is_whole(folder)


def test_what_a_kill_left_beside_a_stage_is_removed_by_who_comes_next(nano, tmp_path):
    """Half a checkpoint, half a folder, and the work of one that was killed when all was done."""
    model, tokenizer = nano
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    folder, _ = Stages(tmp_path).run(model, tokenizer, *sft_job(TASK, 0))
    for left in (f".{folder.name}-0123abcd.tmp", f"{folder.name}.work", f".{folder.name}.gone.tmp"):
        (folder.parent / left / "checkpoint-4").mkdir(parents=True)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(start[name])
    Stages(tmp_path).run(model, tokenizer, *sft_job(TASK, 0))
    left = {f.name for f in folder.parent.iterdir()}
    assert left == {folder.name, f"{folder.name}.lock", f"{folder.name}.used"}


def test_small_steps_of_a_bfloat16_model_are_not_rounded_away(nano, tmp_path):
    model, tokenizer = nano
    model.to(torch.bfloat16)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    recipe = Training(steps=4, batch=4, learning_rate=1e-6, warmup=0.0)
    with in_full_precision(model):
        folder, _ = Stages(tmp_path).run(
            model, tokenizer, *sft_job(replace(TASK, training=recipe), 0)
        )
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    delta = Delta(folder, start, "cpu")
    for name in delta:
        if "proj" in name:  # rows of tokens that do not occur stand still
            assert (delta[name] != 0).float().mean() > 0.9, name
    # nor are they where the tuned model is looked at in its own dtype: on the mean they are there
    moved = {n: p.detach().float() - start[n].float() for n, p in model.named_parameters()}
    along = sum(float((moved[n] * delta[n]).sum()) for n in delta)
    assert along / sum(float(delta[n].square().sum()) for n in delta) == pytest.approx(1, abs=0.5)


def on_a_small_disk(says, cache, room):
    """In a process of its own; after five of twelve steps the system takes no file beyond so many bytes."""
    rows = [dict(prompt="Q: Copy ab.", completion="ab")] * 4
    job, seen = StageConfig("sft", 12, 4, 1e-3, 0.1, 0.0, 64, 0), []

    def progress(done, at):
        seen.append(done)
        if room and done >= 5 / 12:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    try:
        Stages(cache, Launch(save_steps=4)).run(*load("nano-llama"), rows, job, progress)
        says.send(f"done from {seen[0]}")
    except CLGraftError as error:
        says.send(str(error))


@pytest.mark.parametrize("room", [100_000, 300_000], ids=["the weights", "the optimizer"])
def test_a_disk_that_takes_no_more_is_one_sentence_and_the_next_run_goes_on(tmp_path, room):
    """In the middle of the second step checkpoint; the first one stays, and is gone on from."""

    def run(room):
        hears, says = kills.server().Pipe(duplex=False)
        given = (says, tmp_path / "cache", room)
        process = kills.server().Process(target=on_a_small_disk, args=given)
        process.start()
        says.close()
        said = hears.recv()
        process.join()
        return said

    assert re.search("cannot be written .*free space .*run the same command again", run(room))
    assert run(None) == f"done from {5 / 12}"
    assert len(stages_in(tmp_path / "cache")) == 1


def test_what_is_not_the_disks_is_not_said_to_be(nano, tmp_path, monkeypatch):
    """No memory for another process, a broken pipe of the terminal: their own words, and no advice about disks."""
    for number in (errno.ENOMEM, errno.EPIPE):

        def breaks(*args, number=number, **kwargs):
            raise OSError(number, "not the disk")

        monkeypatch.setattr(fit, "fit", breaks)
        with pytest.raises(OSError, match="not the disk"):
            Stages(tmp_path).run(*nano, *sft_job(TASK, 0))


def test_a_stage_that_was_half_fetched_is_fetched_to_its_end(nano, tmp_path, monkeypatch):
    """The network failed between two files of another machine's stage; nothing is trained again."""
    made, _ = Stages(tmp_path / "one", mirror=Mirror((tmp_path / "copy").as_uri())).run(
        *nano, *sft_job(TASK, 0)
    )
    half = tmp_path / "two" / "stages" / made.name
    half.mkdir(parents=True)
    shutil.copy(made / "model.safetensors", half)
    monkeypatch.setattr(fit, "fit", no_training)
    model, tokenizer = load("nano-llama")
    stages = Stages(tmp_path / "two", mirror=Mirror((tmp_path / "copy").as_uri()))
    stages.run(model, tokenizer, *sft_job(TASK, 0))
    assert fingerprint(model.named_parameters()) == fingerprint(nano[0].named_parameters())


def test_step_checkpoints_are_gone_at_once_so_that_no_half_of_them_is_gone_on_from(
    tmp_path, monkeypatch
):
    """A kill while they are removed leaves nothing under the name that the next run looks at; it removes the rest."""
    work = tmp_path / "key.work"
    (work / "checkpoint-6").mkdir(parents=True)
    (work / "checkpoint-6" / fit.WHOLE).touch()
    rmtree, calls = stages.shutil.rmtree, []

    def killed(path, ignore_errors=False):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(stages.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        stages._discard(work)
    assert not work.exists() and [p.name for p in tmp_path.iterdir()] == [".key.work.gone.tmp"]
    stages._discard(work)
    assert not any(tmp_path.iterdir())
