"""Terms: a penalty and a projection do what they say, weigh the same however a step is cut, and are in the key."""

from __future__ import annotations

import json
import textwrap
from dataclasses import replace

import pytest
import torch

from cl_graft import plugins
from cl_graft.config import Launch
from cl_graft.errors import CLGraftError
from cl_graft.models.load import load
from cl_graft.skillpack.format.file import fingerprint
from cl_graft.store.files import read_jsonl
from cl_graft.stream import benchmark
from cl_graft.task import Example, Pair, Preference, Task, Training
from cl_graft.training import term
from cl_graft.training.config import dpo_job, order, sft_job
from cl_graft.training.fit import LOG, fit
from cl_graft.training.stages import Stages, stage_key
from cl_graft.training.term import Term

EXAMPLES = [Example(f"Q: Copy ab{c}.\nA: ", f"ab{c}") for c in "cdefghij"]
RECIPE = Training(steps=1, batch=8, warmup=0.0, learning_rate=1e-3)
HALF = Preference(steps=1, batch=8, learning_rate=1e-3)
SFT = sft_job(Task("t", EXAMPLES, (), "exact", training=RECIPE), 0)
DPO = dpo_job(
    Task("t", (), (), "exact", training=replace(RECIPE, preference=HALF)),
    [Pair(e.prompt, e.completion, "zz") for e in EXAMPLES],
    0,
)
NAME = "model.norm.weight"

PLUGIN = """
    import torch

    def penalty(model, batch, output, state, *, weight):
        named = dict(model.named_parameters())
        return weight * sum(((named[n] - x) ** 2).sum() for n, x in state.items())

    def project(model, gradients, state, step):
        for name, gradient in gradients.items():
            if name not in state:
                gradient.zero_()
            else:
                gradient.copy_(state[name])
"""


@pytest.fixture
def plugin(tmp_path):
    """A user's file of this name, imported as the harness imports it."""

    def write(name="quadratic", text=PLUGIN):
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(text))
        return plugins.import_file(path, f"cl_graft_user_{name}")

    return write


@pytest.fixture
def run(tmp_path):
    """Train a fresh nano-llama; its parameters before and after, and the log."""
    count = 0

    def train(job, terms, **launch):
        nonlocal count
        count += 1
        model, tokenizer = load("nano-llama")
        start = weights(model)
        fit(model, tokenizer, *job, Launch(**launch), tmp_path / f"{count}", terms=terms)
        return start, weights(model), list(read_jsonl(tmp_path / f"{count}" / LOG))

    return train


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


GRADIENTS: list[dict] = []
BATCHES: list[dict] = []


def keep(model, gradients, state, step):
    GRADIENTS.append({n: g.clone() for n, g in gradients.items()})


def see(model, batch, output, state):
    BATCHES.append({**batch, "logits": getattr(output, "logits", None)})
    return model.get_parameter(NAME).sum() * 0


def answers(model, batch, output, state):
    """Mean over the answer tokens of the step of the logits' squares; and one value of the parameters alone."""
    asked = batch["labels"][:, 1:] != -100
    squares = (output.logits[:, :-1] ** 2).mean(-1)[asked]
    return {
        "tokens": squares.sum() / batch["tokens"],
        "norm": model.get_parameter(NAME).square().sum(),
    }


def test_a_quadratic_penalty_pulls_as_worked_out_by_hand(run, plugin):
    """The penalty w (p - a)^2 of one parameter adds 2 w (p - a) to its gradient and nothing to another's."""
    start = weights(load("nano-llama")[0])
    anchor = {NAME: start[NAME] - 0.5}
    GRADIENTS.clear()
    run(SFT, [Term.project(keep)])
    run(SFT, [Term.penalty(plugin().penalty, anchor, weight=3.0), Term.project(keep)])
    plain, with_it = GRADIENTS
    for name in plain:
        wanted = plain[name] + (2 * 3.0 * 0.5 if name == NAME else 0)
        torch.testing.assert_close(with_it[name], wanted)


def numbers(model, batch, output, state):
    return batch["rows"].float().mean()


def test_a_penalty_is_in_the_loss_and_its_mean_in_each_line_of_the_log(run, plugin):
    start = weights(load("nano-llama")[0])
    anchor = {NAME: start[NAME] - 0.5}
    (plain,), (pulled,) = (
        run(SFT, [])[2],
        run(SFT, [Term.penalty(plugin().penalty, anchor, weight=3.0)])[2],
    )
    assert pulled["quadratic"] == pytest.approx(3.0 * 0.25 * start[NAME].numel())
    assert pulled["loss"] - plain["loss"] == pytest.approx(pulled["quadratic"], rel=1e-4)
    job = SFT[0], replace(SFT[1], steps=40, batch=2)
    log = run(job, [Term.penalty(numbers)], micro_batch=1)[2]
    read = torch.tensor(order(8, job[1])).float().view(20, 4)  # two steps of two rows a line
    assert [x["test_terms.numbers"] for x in log] == pytest.approx(read.mean(1).tolist())


def constant(model, batch, output, state):
    return {
        "logged": model.get_parameter(NAME).detach().sum() + 7,
        "added": model.get_parameter(NAME).sum() * 0 + 1,
    }


def test_a_value_without_a_gradient_is_a_column_and_no_part_of_the_loss(run):
    start, end, (plain,) = run(SFT, [])
    _, same, (seen,) = run(SFT, [Term.penalty(constant)])
    name = "test_terms.constant"
    assert seen[f"{name}.logged"] == pytest.approx(start[NAME].sum().item() + 7, rel=1e-5)
    assert seen["loss"] - plain["loss"] == pytest.approx(seen[f"{name}.added"], rel=1e-4) == 1
    assert all(torch.equal(end[n], same[n]) for n in end)


def test_a_projection_is_the_gradient_that_the_step_takes(run, plugin):
    """AdamW's first step goes by the sign of the gradient: everything else stands still but for its decay."""
    start = weights(load("nano-llama")[0])
    state = {NAME: torch.linspace(-1, 1, start[NAME].numel())}
    job = SFT[0], replace(SFT[1], weight_decay=0.0)
    before, after, log = run(job, [Term.project(plugin().project, state)])
    for name in before:
        if name != NAME:
            assert torch.equal(before[name], after[name])
    moved = after[NAME] - before[NAME]
    torch.testing.assert_close(moved, -1e-3 * state[NAME].sign(), rtol=1e-3, atol=1e-8)
    assert log[0]["grad_norm"] == pytest.approx(state[NAME].norm().item()), "clipped after it"


INSTEAD = """
    def loss(model, batch, output, state, *, weight):
        assert output.logits is None
        named = dict(model.named_parameters())
        return weight * sum(((named[n] - x) ** 2).sum() for n, x in state.items())
"""


@pytest.mark.parametrize("micro", [None, 2])
def test_a_loss_takes_the_place_of_sfts_and_costs_no_forward_pass(run, plugin, micro):
    """Its gradient 2 w (p - a) is the whole one, and it is the loss in the log; DPO's loss is what it was."""
    state = {NAME: weights(load("nano-llama")[0])[NAME] - 1}
    terms = [Term.loss(plugin("other", INSTEAD).loss, state, weight=0.5), Term.project(keep)]
    GRADIENTS.clear()
    _, _, (line,) = run(SFT, terms, micro_batch=micro)
    (found,) = GRADIENTS
    torch.testing.assert_close(found.pop(NAME), torch.ones_like(state[NAME]))
    assert not any(x.any() for x in found.values()), "nothing of the NLL"
    assert line["other"] == pytest.approx(0.5 * state[NAME].numel()) == line["loss"]
    assert "entropy" not in line, "no logits were made"
    ends = [run(DPO, given, micro_batch=micro) for given in (terms[:1], [])]
    assert all(torch.equal(ends[0][1][n], x) for n, x in ends[1][1].items())
    assert "other" not in ends[0][2][0]
    with pytest.raises(CLGraftError, match="other and other would both take the place"):
        run(SFT, terms[:1] * 2)


@pytest.mark.parametrize("job", [SFT, DPO], ids=["sft", "dpo"])
def test_a_penalty_weighs_the_same_however_a_step_is_cut(run, job):
    """Whole, and as four micro-batches: the same gradient and the same values in the log."""
    logs = []
    GRADIENTS.clear()
    for micro in (None, 2):
        terms = [Term.penalty(answers, logits=True), Term.project(keep)]
        logs.append(run(job, terms, micro_batch=micro)[2][0])
    whole, cut = GRADIENTS
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6)
    for column in ("test_terms.answers.tokens", "test_terms.answers.norm", "loss"):
        assert logs[0][column] == pytest.approx(logs[1][column], rel=1e-5)
    assert logs[0]["test_terms.answers.norm"] > 1, "it weighs something"


@pytest.mark.parametrize("job", [SFT, DPO], ids=["sft", "dpo"])
def test_logits_on_demand_change_nothing_else(run, job):
    ends = []
    for logits in (False, True):
        BATCHES.clear()
        _, after, _ = run(job, [Term.penalty(see, logits=logits)])
        ends.append(after)
        (batch,) = BATCHES
        assert (batch["logits"] is not None) == logits
    assert batch["logits"].shape[:2] == batch["input_ids"].shape
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("job", [SFT, DPO], ids=["sft", "dpo"])
def test_a_batch_tells_its_rows_and_its_answers(run, job):
    _, tokenizer = load("nano-llama")
    BATCHES.clear()
    run(job, [Term.penalty(see)], micro_batch=4)
    rows = torch.cat([b["rows"][:4] for b in BATCHES]).tolist()
    assert rows == order(8, job[1])
    total = 0
    for batch in BATCHES:
        assert len(batch["rows"]) == len(batch["input_ids"]) == len(batch["attention_mask"])
        for i, row in enumerate(batch["rows"].tolist()):
            labels = batch["labels"][i]
            said = tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
            expected = job[0][row].get(
                "completion", job[0][row].get("chosen" if i < 4 else "rejected")
            )
            assert said.strip() == expected
            total += (labels != -100).sum().item()
    assert batch["tokens"].item() == total / 2, "two micro-batches"


def test_the_key_knows_the_function_its_file_and_all_it_is_given(plugin, nano):
    model, tokenizer = nano
    start = fingerprint(model.named_parameters())

    def key(*terms, origin=""):
        return stage_key(start, tokenizer, *SFT, terms, origin)

    state = {NAME: torch.zeros(3)}
    module = plugin()
    first = Term.penalty(module.penalty, state, weight=1.0)
    others = [
        Term.penalty(module.penalty, state, weight=2.0),
        Term.penalty(module.penalty, {NAME: torch.ones(3)}, weight=1.0),
        Term.penalty(module.penalty, state, logits=True, weight=1.0),
        Term.penalty(module.project, state, weight=1.0),
        Term.project(module.penalty, state, weight=1.0),
        Term.penalty(plugin("other").penalty, state, weight=1.0),
    ]
    found = {key(x) for x in (first, *others)} | {key(), key(first, others[0]), key(origin="mine")}
    assert len(found) == len(others) + 4
    assert key() == stage_key(start, tokenizer, *SFT), "no term, no change"
    assert key(Term.penalty(module.penalty, dict(state), weight=1.0)) == key(first)
    path = first.file
    path.write_text(path.read_text().replace("** 2", "** 4"))
    assert key(Term.penalty(module.penalty, state, weight=1.0)) != key(first)


def test_a_stage_tells_its_terms_and_is_shared_by_them(plugin, nano, tmp_path, monkeypatch):
    model, tokenizer = nano
    start = weights(model)
    pull = Term.penalty(plugin().penalty, {NAME: start[NAME] - 1}, weight=1.0)
    stages = Stages(tmp_path / "cache")
    folders = []
    for terms in ((), (pull,), (pull,)):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(start[name])
        folders.append(stages.run(model, tokenizer, *SFT, terms=terms)[0])
    plain, pulled, again = folders
    assert plain != pulled == again
    (told,) = json.loads((pulled / "stage.json").read_text())["terms"]
    assert told == {
        "name": "quadratic",
        "kind": "penalty",
        "options": {"weight": 1.0},
        "digest": pull.digest,
    }


def test_a_killed_stage_goes_on_with_its_terms(plugin, tmp_path):
    """Killed in the middle; the end is that of a run that was not, bit for bit."""

    def train(folder, kill=None):
        model, tokenizer = load("nano-llama")
        terms = [Term.penalty(plugin().penalty, {NAME: weights(model)[NAME] - 1}, weight=1.0)]

        def progress(done, at):
            if kill and done >= kill:
                raise KeyboardInterrupt

        job = SFT[0], replace(SFT[1], steps=8)
        stages = Stages(tmp_path / folder, Launch(save_steps=4))
        _, log = stages.run(model, tokenizer, *job, progress=progress, terms=terms)
        return fingerprint(model.named_parameters()), [x["quadratic"] for x in log.losses]

    with pytest.raises(KeyboardInterrupt):
        train("killed", kill=6 / 8)
    assert train("killed") == train("whole")


def lag(model, state, step, *, part):
    """The state goes a part of the way to the weights, and counts the steps."""
    state[NAME].lerp_(model.get_parameter(NAME), part)
    state["steps"].add_(1) if step == state["steps"] + 1 else state["steps"].fill_(-99)


def look(model, batch, output, state):
    return state[NAME].detach().sum() * 0 + state["steps"].float()


def lagging(model):
    state = {NAME: weights(model)[NAME] - 1, "steps": torch.zeros((), dtype=torch.int64)}
    return [Term.penalty(look, state), Term.follow(lag, state, part=0.25)]


def test_a_state_follows_the_weights_step_by_step_and_other_terms_see_it(tmp_path):
    """By hand from the weights before each step, whatever the micro-batches; it ends in the stage's folder."""
    model, tokenizer = load("nano-llama")
    terms = [*lagging(model), Term.project(note)]
    given = terms[0].state[NAME].clone()
    job = SFT[0], replace(SFT[1], steps=4)
    NOTED.clear()
    stages = Stages(tmp_path, Launch(micro_batch=4))
    folder, log = stages.run(model, tokenizer, *job, terms=terms)
    seen = [*NOTED[1:], weights(model)[NAME]]
    slow = given
    for fast in seen:
        slow = slow + 0.25 * (fast - slow)
    ends = term.followed(terms, folder)
    torch.testing.assert_close(ends[1].state[NAME], slow)
    assert ends[0].state is ends[1].state and ends[1].state["steps"] == 4
    assert ends[2] is terms[2] and torch.equal(terms[0].state[NAME], given)
    assert [x["test_terms.look"] for x in log.losses] == [0, 1, 2, 3], "as it is before each step"


NOTED: list[torch.Tensor] = []


def note(model, gradients, state, step):
    NOTED.append(weights(model)[NAME])


def test_a_killed_stage_goes_on_with_what_follows_it(tmp_path):
    def train(folder, kill=None):
        model, tokenizer = load("nano-llama")

        def progress(done, at):
            if kill and done >= kill:
                raise KeyboardInterrupt

        job, terms = (SFT[0], replace(SFT[1], steps=8)), lagging(model)
        stages = Stages(tmp_path / folder, Launch(save_steps=4))
        stage, log = stages.run(model, tokenizer, *job, progress=progress, terms=terms)
        ends = term.followed(terms, stage)[1].state
        assert ends["steps"] == 8
        return fingerprint(ends.items()), [x["test_terms.look"] for x in log.losses]

    with pytest.raises(KeyboardInterrupt):
        train("killed", kill=6 / 8)
    assert train("killed") == train("whole")
    assert train("whole") == train("whole"), "recalled"


def test_what_is_saved_for_a_job_is_read_back(plugin, tmp_path):
    module = plugin()
    terms = (
        Term.penalty(module.penalty, {"a": torch.ones(2, 3).T, "b.c": torch.arange(4)}, weight=2),
        Term.project(module.project),
        Term.loss(module.penalty, {"a": torch.ones(1)}, logits=True, weight=1),
    )
    term.save(terms, tmp_path / "terms")
    read = term.load(tmp_path / "terms")
    assert [t.digest for t in read] == [t.digest for t in terms]
    assert [t.about for t in read] == [t.about for t in terms]
    assert [t.logits for t in read] == [False, False, True]


def test_terms_that_share_a_state_share_it_in_a_job_and_are_told_from_those_that_do_not(tmp_path):
    model, tokenizer = load("nano-llama")
    shared, apart = lagging(model), [lagging(model)[0], lagging(model)[1]]
    term.save([Term.project(note), *shared], tmp_path / "terms")
    _, first, second = term.load(tmp_path / "terms")
    assert first.state is second.state and fingerprint(first.state.items()) == fingerprint(
        shared[0].state.items()
    )
    assert [t.digest for t in shared] == [t.digest for t in apart]
    start = fingerprint(model.named_parameters())
    assert stage_key(start, tokenizer, *SFT, shared) != stage_key(start, tokenizer, *SFT, apart)


def exploding(model, batch, output, state):
    return {"a": model.get_parameter(NAME).sum() * 0, "b": torch.tensor(float("inf"))}


def forgetful(model, gradients, state, step):
    gradients[NAME] = gradients[NAME] * 0


def poisoned(model, gradients, state, step):
    gradients[NAME].fill_(float("nan") if step == 1 else 0)


def wordy(model, batch, output, state):
    return 3.0


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (Term.penalty(exploding), r"the term test_terms\.exploding\.b is inf in step 1"),
        (Term.project(poisoned), r"gradient of .* after the term test_terms\.poisoned in step 2"),
        (Term.project(forgetful), r"another tensor in the place of the gradient of model\.norm"),
        (Term.penalty(wordy), r"test_terms\.wordy gives float, not a tensor of one number"),
    ],
    ids=lambda x: "",
)
def test_a_term_that_goes_wrong_leaves_no_stage(nano, tmp_path, added, said):
    job = SFT[0], replace(SFT[1], steps=2)
    with pytest.raises(CLGraftError, match=said):
        Stages(tmp_path).run(*nano, *job, terms=[added])
    assert not list(tmp_path.glob("stages/*/stage.json"))


def test_what_cannot_be_is_refused_before_anything_starts(nano, tmp_path):
    def local(model, gradients, state, step): ...

    with pytest.raises(CLGraftError, match="'.*local' is not defined at the top level"):
        Term.project(local)
    with pytest.raises(CLGraftError, match=r"options of the term .*no plain JSON"):
        Term.penalty(see, weight=torch.ones(1))
    for how, said in (
        (Launch(processes=2, zero=3), "launch with zero=2"),
        (Launch(processes=2, zero=2, offload=True), "offload=false"),
    ):
        with pytest.raises(CLGraftError, match=said):
            Stages(tmp_path, how).run(*nano, *SFT, terms=[Term.project(keep)])
    assert not any(tmp_path.iterdir())


HALVES = """
    def penalty(model, batch, output, state):
        p = model.get_parameter("model.norm.weight")
        asked = batch["labels"][:, 1:] != -100
        squares = (output.logits[:, :-1] ** 2).mean(-1)[asked].sum() / batch["tokens"]
        return {"pull": ((p - state["anchor"]) ** 2).sum(), "squares": 0.1 * squares}

    def project(model, gradients, state, step, *, by):
        largest = max(gradients, key=lambda name: gradients[name].norm())
        gradients[largest].mul_(by)
        gradients["model.layers.0.self_attn.q_proj.weight"].zero_()

    def follow(model, state, step):
        state["anchor"].lerp_(model.get_parameter("model.norm.weight"), 0.25)
"""


@pytest.mark.slow
def test_two_processes_under_zero_2_add_and_project_what_one_does(plugin, tmp_path):
    """The largest gradient of the whole step is halved, another is taken away, by one process and by two alike."""
    module = plugin("halves", HALVES)
    job = SFT[0], replace(SFT[1], steps=8, batch=4)

    def train(folder, launch):
        model, tokenizer = load("nano-llama")
        start = weights(model)
        state = {"anchor": start[NAME] - 1}
        terms = [
            Term.penalty(module.penalty, state, logits=True),
            Term.project(module.project, by=0.5),
            Term.follow(module.follow, state),
        ]
        stage, log = Stages(tmp_path / folder, launch).run(model, tokenizer, *job, terms=terms)
        end = term.followed(terms, stage)[0].state["anchor"]
        return start, {**weights(model), "anchor": end}, log.losses

    start, alone, lines = train("one", Launch())
    _, together, their_lines = train("two", Launch(processes=2, zero=2, micro_batch=1))
    assert not torch.allclose(alone["anchor"], start[NAME] - 1, atol=0.1)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-6)
    for line, theirs in zip(lines, their_lines, strict=True):
        for column in ("loss", "grad_norm", "halves.pull", "halves.squares"):
            assert theirs[column] == pytest.approx(line[column], rel=1e-3), column
    frozen = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(alone[frozen], start[frozen]) and not torch.equal(alone[NAME], start[NAME])


OWN = """
    def loss(model, batch, output, state):
        given = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
        pull = (model.get_parameter("model.norm.weight") - state["anchor"]).square().sum()
        return model(**given, use_cache=False).loss + pull
"""


@pytest.mark.slow
def test_two_processes_under_zero_2_take_a_loss_with_a_pass_of_its_own(plugin, tmp_path):
    """All answers are of one length, so that a mean over rows is the same in halves."""
    module = plugin("own", OWN)
    job = SFT[0], replace(SFT[1], steps=6, batch=4)

    def train(folder, launch):
        model, tokenizer = load("nano-llama")
        anchor = {"anchor": torch.zeros_like(weights(model)[NAME])}
        terms = [Term.loss(module.loss, anchor)]
        _, log = Stages(tmp_path / folder, launch).run(model, tokenizer, *job, terms=terms)
        return weights(model), log.losses

    alone, lines = train("one", Launch())
    together, theirs = train("two", Launch(processes=2, zero=2, micro_batch=2))
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-6)
    assert [x["loss"] for x in theirs] == pytest.approx([x["loss"] for x in lines], rel=1e-4)


@pytest.mark.parametrize("name", ["ewc", "agem", "lwf", "o_lora", "osf", "sure", "dft"])
def test_a_method_with_terms_is_refused_under_zero_3_before_its_cell_begins(name, tmp_path, call):
    words = [
        "run",
        "--scenario",
        "mini",
        "--strategy",
        name,
        "--model",
        "nano-llama",
        "--wandb",
        "off",
    ]
    words += ["--out", tmp_path / "out", "--allow-code-execution"]
    done = call(*words, "--launch", "processes=2,zero=3")
    assert done.code == 1 and f"strategy '{name}'" in done.err and "zero=2" in done.err
    assert not (tmp_path / "out").exists()


def test_a_term_that_a_method_does_not_declare_is_an_error(build, tiny_scenario):
    """Else the launch that cannot carry it would be found out when the first task is learned already."""
    strategy = build("lwf")
    strategy.terms = ()
    stream = benchmark(tiny_scenario).train_stream
    strategy.train(stream[0], eval_streams=[])
    with pytest.raises(CLGraftError, match="declare.*penalty"):
        strategy.train(stream[1], eval_streams=[])
