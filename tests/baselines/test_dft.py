"""DFT: its loss and gradient by hand, those of TRL's own on the same batch, and SFT alone is another model for it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cl_graft.config import Launch
from cl_graft.models.load import load
from cl_graft.store.files import read_jsonl
from cl_graft.task import Example, Pair, Preference, Task, Training
from cl_graft.training.config import order, sft_job
from cl_graft.training.fit import LOG, fit
from cl_graft.training.term import Term
from cl_graft.training.tokens import tokens
from tests.baselines.methods import learn, module, spied

EXAMPLES = [Example(f"Q: Copy {'ab' * k}.\nA: ", "ab" * k) for k in range(1, 9)]
RECIPE = Training(steps=1, batch=8, warmup=0.0, weight_decay=0.0, learning_rate=1e-3)


def test_the_loss_and_its_gradient_are_those_worked_out_by_hand():
    """Tokens of probability 1/2 and 1/4: (ln 2 / 2 + ln 4 / 4) / 2; d/dlogits of each is p (softmax - onehot)."""
    p = torch.tensor([0.5, 0.25, 0.25])
    logits = p.log().repeat(1, 4, 1).requires_grad_()
    batch = {"labels": torch.tensor([[-100, -100, 0, 1]]), "tokens": torch.tensor(2.0)}
    found = module("dft").loss(None, batch, SimpleNamespace(logits=logits), {})
    ln2 = torch.tensor(2.0).log()
    assert found.item() == pytest.approx((ln2 / 2 + 2 * ln2 / 4).item() / 2)
    found.backward()
    eye = torch.eye(3)
    wanted = torch.stack([0 * p, 0.5 * (p - eye[0]), 0.25 * (p - eye[1]), 0 * p])[None] / 2
    torch.testing.assert_close(logits.grad, wanted)


GRADIENTS: list[dict[str, torch.Tensor]] = []


def keep(model, gradients, state, step):
    GRADIENTS.append({n: g.clone() for n, g in gradients.items()})


@pytest.mark.parametrize("micro", [None, 2], ids=["whole", "cut"])
def test_a_step_has_the_loss_and_the_gradient_of_trls_dft(tmp_path, micro):
    """TRL 1.16 weighs what its fused head gives; ours reads the logits. The answers are of different lengths."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    job = sft_job(Task("t", EXAMPLES, (), "exact", training=RECIPE), 0)
    model, tokenizer = load("nano-llama")
    GRADIENTS.clear()
    terms = [Term.loss(module("dft").loss, logits=True), Term.project(keep)]
    fit(model, tokenizer, *job, Launch(micro_batch=micro), tmp_path / "ours", terms=terms)
    (line,) = read_jsonl(tmp_path / "ours" / LOG)
    assert line["loss"] == pytest.approx(line["dft"]) and line["entropy"] > 0

    theirs, tokenizer = load("nano-llama")
    rows = [dict(r) for r in tokens(tokenizer, job[0], job[1])]
    seen = []
    where = {"output_dir": str(tmp_path / "trl"), "report_to": [], "use_cpu": True}
    size = micro or 8

    class Spied(trl.SFTTrainer):
        def _get_train_sampler(self, *_):
            return order(8, job[1])

        def _clip_grad_norm(self, model):
            seen.append({n: p.grad.clone() for n, p in theirs.named_parameters()})
            return super()._clip_grad_norm(model)

    trainer = Spied(
        model=theirs,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{k: r[k] for k in ("input_ids", "labels")} for r in rows]),
        args=trl.SFTConfig(
            **where,
            max_steps=1,
            loss_type="dft",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            logging_steps=1,
            learning_rate=1e-3,
            max_length=None,
            bf16=False,  # which TRL turns on, on a CPU too
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(line["loss"], rel=1e-5)
    for name, gradient in GRADIENTS[0].items():
        torch.testing.assert_close(gradient, seen[0][name], rtol=1e-4, atol=1e-7)


def test_the_preference_half_is_as_it_is_and_the_model_another_than_sequentials(
    build, tiny_scenario
):
    half = Preference(steps=2, batch=4, learning_rate=1e-3)

    def recipe(task):
        pairs = [Pair(e.prompt, e.completion, "no") for e in task.train[:8]]
        return replace(task, pairs=pairs, training=replace(task.training, preference=half))

    scenario = replace(tiny_scenario, tasks=tuple(map(recipe, tiny_scenario.tasks)))
    ends, columns = [], []
    for name in ("sequential", "dft"):
        strategy = build(name, scenario=scenario)
        asked = spied(strategy)
        ends.append(learn(strategy, scenario, 1).packs[0].decode())
        columns.append([{"dft", "rewards/margins"} & set(a["log"].losses[0]) for a in asked])
    assert columns == [[set(), {"rewards/margins"}], [{"dft"}, {"rewards/margins"}]]
    assert any((ends[0][n] - ends[1][n]).abs().max() > 1e-4 for n in ends[0])
