"""Training that is shared changes nothing but the time it takes."""

from __future__ import annotations

from cl_graft.stream import benchmark


def learn(strategy, scenario, stages, experiences=2):
    strategy.stages = stages
    for experience in list(benchmark(scenario).train_stream)[:experiences]:
        strategy.train(experience, eval_streams=[])
    return strategy


def stages_in(folder):
    return sorted(p.name for p in folder.glob("*.safetensors"))


def test_a_second_method_trains_nothing_and_gets_the_same_delta(
    build, tiny_scenario, tmp_path, monkeypatch
):
    alone = learn(build("graftllm", calibration_batches=1), tiny_scenario, None)
    learn(build("individual"), tiny_scenario, tmp_path)
    assert len(stages_in(tmp_path)) == 2
    shared = build("graftllm", calibration_batches=1)
    monkeypatch.setattr(
        shared, "train_in_place", lambda *a: (_ for _ in ()).throw(AssertionError("trained"))
    )
    learn(shared, tiny_scenario, tmp_path)
    assert [p.digest for p in shared.packs] == [p.digest for p in alone.packs]
    assert shared.seconds["train"] > 0 and shared.seconds["compress"] > 0


def test_another_seed_recipe_or_start_is_another_stage(build, tiny_scenario, tmp_path):
    learn(build("individual"), tiny_scenario, tmp_path, 1)
    first = stages_in(tmp_path)
    learn(build("sequential"), tiny_scenario, tmp_path, 1)
    assert stages_in(tmp_path) == first, "the first task starts from the base for both"
    learn(
        build("individual", scenario=tiny_scenario.with_training(batch=4)),
        tiny_scenario,
        tmp_path,
        1,
    )
    other = build("individual")
    other.seed = 1
    learn(other, tiny_scenario, tmp_path, 1)
    assert len(stages_in(tmp_path)) == 3


def test_a_damaged_stage_is_trained_again(build, tiny_scenario, tmp_path):
    whole = learn(build("individual"), tiny_scenario, tmp_path, 1)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    again = learn(build("individual"), tiny_scenario, tmp_path, 1)
    assert again.packs[0].digest == whole.packs[0].digest
    assert file.stat().st_size > 1000
