"""SDFT: the KL of answers that the student draws, by brute force and by TRL's formula, and a teacher that follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_graft.config import Launch
from cl_graft.evaluation.generate import endings
from cl_graft.models.chat import added
from cl_graft.models.load import load
from cl_graft.models.text import encode_prompts
from cl_graft.skillpack.format.file import fingerprint
from cl_graft.task import Pair, Preference
from cl_graft.training.stages import Stages
from tests.baselines.methods import learn, module, spied

PROMPTS = ["Q: Copy ab.\nA: ", "Q: Copy abcdef twice.\nA: ", "Q: 1 + 1?\nA: "]
SHOWN = ["Q: Copy ab.\nA: like ab\n", "Q: Copy abcdef twice.\nA: abcdefabcdef", "Q: 1 + 1?\nA: 2"]
LENGTH = 5


@pytest.fixture
def given(nano):
    """A model, a teacher apart from it, and what the loss is given; the same draws every time."""
    model, tokenizer = nano
    torch.manual_seed(3)
    padded = module("sdft")._padded
    state = {
        "asked": padded(encode_prompts(tokenizer, PROMPTS), None),
        "shown": padded(encode_prompts(tokenizer, SHOWN), None),
    }
    state |= {f"teacher/{n}": 1.1 * p.detach().clone() for n, p in model.named_parameters()}
    ends, pad = endings(model, tokenizer), tokenizer.pad_token_id

    def loss(rows=(0, 1, 2), skip=0):
        torch.manual_seed(0)
        batch = {"rows": torch.tensor(rows)}
        how = {"length": LENGTH, "skip": skip, "pad": pad, "ends": ends}
        return module("sdft").loss(model, batch, None, state, **how)

    return model, tokenizer, state, loss


def by_hand(model, tokenizer, state, rows=(0, 1, 2), skip=0):
    """Every distribution from a pass of its own over one answer so far, and every KL from its terms."""
    pad, ends = tokenizer.pad_token_id, endings(model, tokenizer)
    torch.manual_seed(0)
    asked = state["asked"][list(rows)].long()
    said, _ = module("sdft").drawn(model, asked, LENGTH, pad, ends)
    teacher = {n[8:]: x for n, x in state.items() if n.startswith("teacher/")}
    means = []
    for row, answer in zip(rows, said.tolist(), strict=True):
        answer = answer[: next((i + 1 for i, t in enumerate(answer) if t in ends), len(answer))]
        apart = []
        for i in range(skip, len(answer)):
            logs = []
            for text, weights in (
                (SHOWN[row], teacher),
                (PROMPTS[row], dict(model.named_parameters())),
            ):
                ids = torch.tensor([tokenizer(text)["input_ids"] + answer[:i]])
                out = torch.func.functional_call(model, weights, kwargs={"input_ids": ids})
                logs.append(out.logits[0, -1].log_softmax(-1))
            apart.append((logs[0].exp() * (logs[0] - logs[1])).sum())
        means.append(torch.stack(apart).mean() if apart else torch.tensor(0.0))
    return torch.stack(means).mean()


@pytest.mark.parametrize("skip", [0, 3])
def test_the_loss_is_the_forward_kl_by_brute_force(given, skip):
    model, tokenizer, state, loss = given
    found = loss(skip=skip)
    assert found.item() > 1e-4
    wanted = by_hand(model, tokenizer, state, skip=skip)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    wanted.backward()
    brute = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss(skip=skip).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, brute[name], rtol=1e-3, atol=1e-6)
    assert not any(x.requires_grad for x in state.values())


def test_it_is_trls_with_alpha_0_and_not_with_its_default(given, monkeypatch):
    """On the same logits: TRL's full-vocabulary loss at alpha 0, and the mixture on 100 tokens that it takes by itself."""
    trl = pytest.importorskip("trl.experimental.sdft.loss_utils")
    logits = []
    kl = torch.nn.functional.kl_div
    monkeypatch.setattr(
        torch.nn.functional, "kl_div", lambda a, b, **k: logits.append((a, b)) or kl(a, b, **k)
    )
    model, tokenizer, state, loss = given
    found = loss(rows=(1,)).item()
    student, teacher = logits[0]
    torch.manual_seed(0)
    asked = state["asked"][[1]].long()
    _, read = module("sdft").drawn(
        model,
        module("sdft")._trimmed(asked),
        LENGTH,
        tokenizer.pad_token_id,
        endings(model, tokenizer),
    )

    def theirs(per_token):
        return (per_token * read).sum() / read.sum()

    full = trl.compute_full_logit_self_distillation_loss
    assert theirs(full(student, teacher, distillation_alpha=0.0)).item() == pytest.approx(found)
    top = {"distillation_topk": 100, "distillation_alpha": 0.5, "distillation_add_tail": False}
    default = theirs(trl.compute_topk_self_distillation_loss(student, teacher, **top)).item()
    assert default < 0.5 * found


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(given):
    model, _, state, loss = given
    state |= {"shown": state["asked"]}
    state |= {f"teacher/{n}": p.detach().clone() for n, p in model.named_parameters()}
    found = loss()
    found.backward()
    assert abs(found.item()) < 1e-6
    assert all(p.grad.abs().max() < 1e-5 for p in model.parameters())


@torch.no_grad()
def test_the_teacher_follows_by_a_share_of_the_way_after_each_step(given):
    """From a and students b, then c: a + (b - a) / 10, then the tenth of the way from there to c."""
    model, _, state, loss = given
    name = "model.norm.weight"
    a = state[f"teacher/{name}"].clone()
    loss(rows=(0,))
    assert torch.equal(state[f"teacher/{name}"], a), "a loss does not move it"
    for step, value in ((1, 2.0), (2, 5.0)):
        model.get_parameter(name).fill_(value)
        module("sdft").follow(model, state, step, rate=0.1)
        a += (value - a) / 10
        torch.testing.assert_close(state[f"teacher/{name}"], a)


def test_a_killed_stage_draws_on_as_if_it_had_not_been(tmp_path, build, tiny_scenario):
    """Answers and the teacher go on from the step checkpoint: the same weights in the end, bit for bit."""

    def train(folder, kill=None):
        model, tokenizer = load("nano-llama")
        strategy = build("sdft", rate=0.2)
        strategy.model, strategy.tokenizer = model, tokenizer
        strategy.stages = Stages(tmp_path / folder, Launch(save_steps=2))

        def progress(what, done, at=""):
            if kill and done >= kill and what.startswith("training"):
                raise KeyboardInterrupt

        strategy.progress = progress
        task = tiny_scenario.tasks[0]
        strategy.learn(task, strategy.context(task), rate=0.2, skip=0)
        return fingerprint(model.named_parameters()), [x["sdft"] for x in strategy.log.losses]

    with pytest.raises(KeyboardInterrupt):
        train("killed", kill=3 / 6)
    assert list(tmp_path.glob("killed/stages/*.work/checkpoint-*/followed.safetensors"))
    assert train("killed") == train("whole")


def test_a_recipe_with_preferences_has_its_dpo_and_the_demonstrations_are_shown(
    build, tiny_scenario
):
    half = Preference(steps=2, batch=4, learning_rate=1e-3)

    def recipe(task):
        pairs = [Pair(e.prompt, e.completion, "no") for e in task.train[:8]]
        return replace(task, pairs=pairs, training=replace(task.training, preference=half))

    scenario = replace(tiny_scenario, tasks=tuple(map(recipe, tiny_scenario.tasks)))
    strategy = build("sdft", scenario=scenario)
    asked = spied(strategy)
    learn(strategy, scenario)
    sft, dpo = asked[:2]
    assert all(line["sdft"] > 0 for line in sft["log"].losses)
    assert "sdft" not in dpo["log"].losses[0] and "rewards/margins" in dpo["log"].losses[0]
    first, state = scenario.tasks[0].train[0], sft["terms"][0].state
    ids = state["shown"][0]
    text = strategy.tokenizer.decode(ids[ids >= 0], skip_special_tokens=True)
    assert (
        text
        == f"""{first.prompt}
This is an example for a response to the question:
{first.completion}
Now answer with a response of your own, including the thinking process:
"""
    )
    delta = strategy.packs[0].decode()
    for name, parameter in strategy.base.items():
        held = asked[2]["terms"][0].state[f"teacher/{name}"]
        assert torch.equal(held, parameter + delta[name]), (
            "the second task's teacher begins as its student"
        )
    assert not strategy.shared


def test_in_a_chat_template_the_demonstration_is_in_the_users_turn(nano):
    _, tokenizer = nano
    assert added(tokenizer, "a", " b") == "a b"
    tokenizer.chat_template = (
        "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    tokenizer.bos_token = None
    assert added(tokenizer, "<u>a</u><a>", " b") == "<u>a b</u><a>"
    assert added(tokenizer, "a", " b") == "a b", "no turn"


def test_prompts_are_cut_to_what_the_positions_leave():
    cut = module("sdft")._padded([[1, 2, 3, 4], [5]], 3)
    assert cut.tolist() == [[2, 3, 4], [-1, -1, 5]]
