"""Training that comes to no numbers is said so where it happens, and leaves nothing that is gone on from."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from cl_graft.errors import Diverged
from cl_graft.strategy.base import Strategy
from cl_graft.stream import benchmark
from cl_graft.task import Example, Pair, Preference, Task, Training
from cl_graft.training.config import dpo_job, sft_job
from cl_graft.training.stages import Stages
from tests.refusals import one_sentence

EXAMPLES = [Example(f"Q: Copy ab{c}.\nA: ", f"ab{c}") for c in "cdefghij"]
PAIRS = [Pair(e.prompt, e.completion, "zz") for e in EXAMPLES]
HALF = Preference(steps=8, batch=4, learning_rate=1e5)
TASK = Task("t", EXAMPLES, (), "exact", training=Training(8, 4, 1e4, warmup=0.0, preference=HALF))
JOBS = {"sft": sft_job(TASK, 0), "dpo": dpo_job(TASK, PAIRS, 0)}


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.parametrize("wrap", [lambda model: model, adapted], ids=["whole", "adapter"])
def test_the_step_and_the_rate_are_named_and_no_stage_is_left(nano, tmp_path, kind, wrap):
    model, tokenizer = nano
    told = r"diverged in step \d of 8 \(.*nan.*\) at a learning rate of 1(0000|e\+05)"
    said = one_sentence(
        lambda: Stages(tmp_path).run(wrap(model), tokenizer, *JOBS[kind]),
        Diverged,
        "lower the learning rate.",
    )
    assert re.search(told, said)
    left = {path.suffix for path in (tmp_path / "stages").iterdir()}
    assert left <= {".lock", ".used"}, "neither the stage nor its step checkpoints"


def test_weights_that_only_the_last_step_loses_are_seen(nano, tmp_path):
    """Its loss and gradients are finite; what it leads to overflows float32."""
    model, tokenizer = nano
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 10.0
    recipe = Training(steps=1, batch=4, learning_rate=3e37, warmup=0.0, weight_decay=11.3)
    job = sft_job(replace(TASK, training=recipe), 0)
    said = one_sentence(lambda: Stages(tmp_path).run(model, tokenizer, *job), Diverged)
    assert re.search(r"step 1 of 1 \(.* holds NaN or Inf\)", said)


def test_the_task_is_named_by_the_strategy(build, tiny_scenario):
    fast = tiny_scenario.with_training(learning_rate=1e5, steps=8)
    strategy = build("sequential", scenario=fast)
    stream = benchmark(fast).train_stream
    said = one_sentence(lambda: strategy.train(stream[0], eval_streams=[]), Diverged)
    assert said.startswith("SFT of task 'math': it diverged in step")


class Loop(Strategy):
    """A training loop of its own, which ends in NaN."""

    def learn(self, task, context, *, how: str = "weights"):
        if how == "weights":
            for parameter in self.model.parameters():
                parameter.data.fill_(float("nan"))
            return context.dense({n: p.detach() for n, p in self.model.named_parameters()})
        if how == "decomposition":
            torch.linalg.eigh(torch.full((8, 8), float("nan")))
        kept = context.dense({n: 0 * p.detach() for n, p in self.model.named_parameters()})
        next(iter(kept.values())).parts["values"][:] = float("inf")
        return kept


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("weights", "left NaN or Inf in"),
        ("kept", "keeps NaN or Inf in"),
        ("decomposition", "cannot decompose what training changed"),
    ],
)
def test_a_loop_of_a_methods_own_is_watched_too(nano, tiny_scenario, how, told):
    from cl_graft.budget import Budget

    model, tokenizer = nano
    given = {"budget": Budget("400%", sum(p.numel() for p in model.parameters())), "seed": 0}
    strategy = Loop(
        model=model, tokenizer=tokenizer, scenario=tiny_scenario, options={"how": how}, **given
    )
    first = benchmark(tiny_scenario).train_stream[0]
    said = one_sentence(lambda: strategy.train(first, eval_streams=[]), Diverged)
    assert said.startswith("Loop in task 'math' ") and told in said
