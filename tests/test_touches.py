"""What a method declares not to touch is frozen while it tunes, is not kept, and is told wherever training is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from cl_graft import plugins
from cl_graft.errors import CLGraftError
from cl_graft.models.roles import roles, untouched
from cl_graft.planning.memory import Job, estimate
from cl_graft.planning.plan import plan
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.strategy import Strategy, compressor
from cl_graft.stream import benchmark
from cl_graft.sweep_config import Sweep
from cl_graft.task import Pair, Preference
from cl_graft.training.stages import MARKER, Stages
from tests.test_strategies import QUICK

SIZES = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=2)


def of_role(model: Any, *named: str) -> set[str]:
    return {name for name, role in roles(model).items() if role in named}


def made(build: Any, name: str, folder: Any, scenario: Any, touches: Any = None) -> Any:
    """The strategy with stages in the folder, having learned one task."""
    strategy = build(name)
    if touches:
        strategy.touches = touches
    strategy.stages = Stages(folder)
    strategy.train(benchmark(scenario).train_stream[0], eval_streams=[])
    return strategy


def test_a_stage_leaves_untouched_parameters_bit_for_bit(
    build: Any, tiny_scenario: Any, tmp_path: Any
) -> None:
    """Both halves of a recipe, SFT and DPO; afterwards the model is as ready to be trained as before."""
    tailor = build("model_tailor")
    tailor.stages = Stages(tmp_path)
    task = tiny_scenario.tasks[0]
    pairs = [Pair(e.prompt, e.completion, "1") for e in task.train[:8]]
    recipe = task.training.__class__(steps=4, batch=4, preference=Preference(steps=4, batch=4))
    tailor.teach(
        tailor.model, task.__class__("t", task.train, (), "exact", training=recipe, pairs=pairs)
    )
    assert all(p.requires_grad for p in tailor.model.parameters())
    kept = of_role(tailor.model, "embedding", "head", "norm")
    assert kept == tailor.untouched(task) and kept < tailor.base.keys()
    folders = [file.parent for file in tmp_path.glob(f"stages/*/{MARKER}")]
    assert len(folders) == 2
    for folder in folders:
        assert json.loads((folder / MARKER).read_text())["frozen"] == sorted(kept)
        for name, start in tailor.base.items():
            assert Checkpoint(folder).read(name).equal(start) == (name in kept), name


@pytest.mark.parametrize("name", plugins.names("strategy"))
def test_a_recipe_freezes_the_embeddings_whatever_the_method(
    name: str, build: Any, tiny_scenario: Any
) -> None:
    """And trains something else."""
    scenario = frozen(tiny_scenario)
    strategy = build(name, scenario=scenario, **QUICK.get(name, {}))
    strategy.train(benchmark(scenario).train_stream[0])
    strategy.grafted.activate(strategy.compose(0))
    moved = {n for n, p in strategy.model.named_parameters() if not p.equal(strategy.base[n])}
    assert moved and not moved & of_role(strategy.model, "embedding", "head")


def frozen(scenario: Any) -> Any:
    """The scenario's first task, in two steps that leave the embeddings as they are."""
    recipe = replace(scenario.tasks[0].training, steps=2, freeze_embeddings=True)
    return replace(scenario, tasks=(replace(scenario.tasks[0], training=recipe),))


def test_a_recipe_that_leaves_nothing_to_train_is_refused(build: Any, tiny_scenario: Any) -> None:
    @compressor(touches=("embedding", "head"))
    def words(delta: Any, context: Any) -> Any:
        return context.dense(delta)

    scenario = frozen(tiny_scenario)
    strategy = words(**given(build("individual", scenario=scenario)))
    with pytest.raises(CLGraftError, match="'math' freezes the embeddings, and words touches noth"):
        strategy.train(benchmark(scenario).train_stream[0])


def test_stages_are_shared_by_methods_that_touch_the_same(
    build: Any, tiny_scenario: Any, tmp_path: Any
) -> None:
    def stages() -> int:
        return len([*tmp_path.glob(f"stages/*/{MARKER}")])

    matrices = ("attention", "mlp", "other")
    for name, touches, known in [
        ("individual", None, 1),
        ("magnitude", None, 1),
        ("model_tailor", None, 2),
        ("magnitude", matrices, 2),
        ("magnitude", (*matrices, "norm"), 3),
    ]:
        made(build, name, tmp_path, tiny_scenario, touches)
        assert stages() == known, (name, touches)


def test_what_is_kept_of_an_untouched_role_is_refused(build: Any, tiny_scenario: Any) -> None:
    """And the delta that a method is given does not have it."""
    seen: list[set[str]] = []

    @compressor(touches=("attention",))
    def greedy(delta: Any, context: Any) -> Any:
        seen.append({*delta})
        return context.dense({n: x.float() for n, x in context.start.items()})

    strategy = greedy(**given(build("individual")))
    with pytest.raises(CLGraftError, match="greedy keeps a delta of .*it declares not to touch"):
        strategy.train(benchmark(tiny_scenario).train_stream[0], eval_streams=[])
    assert seen == [of_role(strategy.model, "attention")]


def given(strategy: Any) -> dict[str, Any]:
    names = ("model", "tokenizer", "scenario", "budget", "seed", "options")
    return {name: getattr(strategy, name) for name in names}


@pytest.mark.parametrize(("touches", "told"), [(("heads",), "heads"), ((), "nothing")])
def test_a_declaration_names_roles(touches: Any, told: str) -> None:
    with pytest.raises(CLGraftError, match=f"careless touches {told}; name some of the roles"):
        type("careless", (Strategy,), {"touches": touches})


def test_a_tied_embedding_is_frozen_if_either_is() -> None:
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1, tie_word_embeddings=True))
    rest = ("attention", "mlp", "norm", "other")
    embedding = {"model.embed_tokens.weight"}
    assert untouched(tied, ("embedding", "head", *rest)) == set()
    for touches in (("embedding", *rest), ("head", *rest), rest):
        assert untouched(tied, touches) == embedding, touches
    apart = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1))
    assert untouched(apart, ("embedding", *rest)) == {"lm_head.weight"}


def test_a_plan_counts_what_is_trained(tmp_path: Any) -> None:
    sizes = {"steps": 2, "batch": 8, "train_size": 48, "test_size": 8, "tasks": "math"}
    cells = Sweep(
        scenarios=[{"mini": sizes}],
        strategies=["individual", "model_grafting"],
        models=["nano-llama"],
        out=tmp_path,
        wandb="off",
    ).cells()
    whole, part = plan(cells).stages
    assert whole.trained == whole.parameters == part.parameters == 63_216
    assert part.trained == 63_216 - 2 * 224 * 48
    assert part.memory.gradients == 4 * part.trained and part.memory.device < whole.memory.device
    assert part.disk < whole.disk


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_gradients_and_moments_is_that_of_what_is_trained(checkpointing: bool) -> None:
    """Checkpointed layers get gradients also where the embedding has none."""
    model = LlamaForCausalLM(CONFIG)
    frozen = of_role(model, "embedding", "head")
    trained = sum(p.numel() for n, p in model.named_parameters() if n not in frozen)
    job = Job("sft", 2, 8, frozen=tuple(frozen), checkpointing=checkpointing)
    found = estimate(CONFIG, job)
    assert (found.gradients, found.optimizer) == (4 * trained, 8 * trained)


def test_lists_say_what_a_strategy_touches(call: Any) -> None:
    said = call("list", "strategies", "model_tailor", "individual", "--verbose").out
    assert "    touches: attention, mlp, other\n" in said
    assert "    touches: embedding, head, attention, mlp, norm, other\n" in said
