"""Prompts in a chat template: the ids that a model was trained on, with one beginning and no answer yet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cl_graft import plugins
from cl_graft.config import RunConfig
from cl_graft.evaluation.generate import endings
from cl_graft.experiment.prepare import strategy_of
from cl_graft.models.chat import (
    NoChatTemplate,
    end_turns,
    is_chat,
    render,
    rendered,
    told,
    user_turn,
)
from cl_graft.models.embedded import SPECS, new_llama
from cl_graft.models.load import load_tokenizer
from cl_graft.models.text import encode_all
from cl_graft.store.digests import vocabulary
from cl_graft.task import Example, Pair, Scenario, Task
from cl_graft.training.config import jobs
from cl_graft.training.tokens import tokens
from tests.chat import CHATML, llama_tokenizer, qwen_tokenizer

PROMPTS = [
    "What is 1+1?",
    "  two\n\nlines: é, <b>, {{ x }}  ",
    "",
    "<|eot|> and <|im_end|> in a question",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_the_ids_are_those_of_the_chat_template(family: str, prompt: str) -> None:
    tokenizer = {"llama": llama_tokenizer, "qwen": qwen_tokenizer}[family]()
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    found = tokenizer(render(tokenizer, [prompt])[0])["input_ids"]
    if family == "llama":  # the date apart, which the template alone would take from the clock
        today = tokenizer.decode(wanted).split("Today: ")[1].split("<|eot|>")[0]
        wanted = tokenizer(
            tokenizer.decode(wanted).replace(today, "26 Jul 2024"), add_special_tokens=False
        )["input_ids"]
    assert found == wanted


def test_what_a_llama_reads() -> None:
    tokenizer = llama_tokenizer()
    text = render(tokenizer, ["Hi "])[0]
    assert text == (
        "<|start|>system<|end|>\n\nToday: 26 Jul 2024<|eot|>"
        "<|start|>user<|end|>\n\nHi<|eot|><|start|>assistant<|end|>\n\n"
    )
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_what_a_qwen_reads() -> None:
    text = render(qwen_tokenizer(), ["Hi"])[0]
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_tokenizer_without_a_template_is_refused_in_one_sentence() -> None:
    with pytest.raises(NoChatTemplate, match="has no chat template .* instruction-tuned") as caught:
        render(llama_tokenizer(None), ["Hi"])
    assert "\n" not in str(caught.value)


def test_a_template_without_the_token_that_the_tokenizer_adds_is_refused() -> None:
    """It would be there in `tokenizer(...)`, where the model expects none."""
    with pytest.raises(NoChatTemplate, match="adds tokens"):
        render(llama_tokenizer(CHATML), ["Hi"])


def test_the_cure_of_that_leads_to_the_templates_own_ids(tmp_path: Path) -> None:
    """transformers (5.23) by itself drops the two settings where there is a tokenizer.json."""
    llama_tokenizer(CHATML).save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    off = {"add_bos_token": False, "add_eos_token": False}
    config.write_text(json.dumps(json.loads(config.read_text()) | off))
    tokenizer = load_tokenizer("m", str(tmp_path))
    text = render(tokenizer, ["Hi"])[0]
    assert tokenizer(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_many_prompts_are_tokenised_together_if_at_all(family: str) -> None:
    """One by one, ten thousand rows of training data take a cell of a sweep ten seconds."""
    tokenizer = {"llama": llama_tokenizer, "qwen": qwen_tokenizer}[family]()
    singly = [render(tokenizer, [prompt])[0] for prompt in PROMPTS * 20]
    calls = 0

    class Counting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            return super().__call__(*args, **options)

    tokenizer.__class__ = Counting
    assert render(tokenizer, PROMPTS * 20) == singly
    assert calls <= 3


def test_every_prompt_of_a_scenario_is_rendered_and_nothing_else() -> None:
    tokenizer = qwen_tokenizer()
    task = Task(
        "a",
        [Example("p", "c")],
        [Example("q", "d", suite="S")],
        "exact",
        pairs=[Pair("r", "+", "-")],
    )
    general = Task("g", (), [Example("s", "e")], "exact")
    scenario = Scenario("x", (task,), general=general, chat=True)
    done = rendered(scenario, tokenizer)
    (made,) = done.tasks
    assert made.train == [Example(render(tokenizer, ["p"])[0], "c")]
    assert made.test == [Example(render(tokenizer, ["q"])[0], "d", suite="S")]
    assert made.pairs == [Pair(render(tokenizer, ["r"])[0], "+", "-")]
    assert done.general and done.general.test == [Example(render(tokenizer, ["s"])[0], "e")]
    assert rendered(done, tokenizer) is done, "never twice"


def test_a_scenario_that_is_not_for_chat_needs_no_template() -> None:
    plain = Scenario("x", (Task("a", [Example("p", "c")], [], "exact"),))
    assert rendered(plain, llama_tokenizer(None)) is plain


@pytest.mark.parametrize(
    ("chat", "base", "instructed"), [(None, False, True), (False, False, False), (True, True, True)]
)
def test_a_scenario_that_says_nothing_goes_by_the_model(
    chat: bool | None, base: bool, instructed: bool
) -> None:
    scenario = Scenario(
        "s", (Task("t", (Example("a", " b"),), (Example("c", " d"),), "exact"),), chat=chat
    )
    assert is_chat(llama_tokenizer(None), scenario.chat) is base
    assert is_chat(qwen_tokenizer(), scenario.chat) is instructed
    if not instructed:
        assert rendered(scenario, qwen_tokenizer()).tasks == scenario.tasks


def test_an_answer_that_is_a_turn_begins_without_the_space_behind_a_colon() -> None:
    train = (Example("Q:", " World", choices=(" World", " Sports")), Example("R:", "    return 1"))
    pairs = (Pair("Q:", chosen=" World", rejected=" "),)
    task = Task("t", train, (Example("S:", "plain"),), "exact", pairs=pairs)
    (found,) = rendered(Scenario("s", (task,)), qwen_tokenizer()).tasks
    both = {e.completion: e for e in (*found.train, *found.validation)}
    assert set(both) <= {"World", "    return 1"} and found.test[0].completion == "plain"
    assert all(e.choices in ((), ("World", "Sports")) for e in both.values())
    assert (found.pairs[0].chosen, found.pairs[0].rejected) == ("World", " ")


def test_the_record_says_what_is_around_a_prompt() -> None:
    system = "You help."
    template = "{{ '<|im_start|>system\n" + system + "<|im_end|>\n' }}" + CHATML
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = template
    assert system in told(tokenizer) and "'<|im_end|>\\n<|im_start|>assistant\\n'" in told(
        tokenizer
    )


# In the manner of Gemma: a turn ends in a token of its own, and the tokenizer names another end.
TURNS = CHATML.replace("<|im_start|>", "<|start|>").replace("<|im_end|>", "<|end|>")


def test_a_turn_ends_in_the_templates_token_and_not_in_what_the_tokenizer_calls_the_end() -> None:
    for tokenizer in (llama_tokenizer(), qwen_tokenizer()):
        before = tokenizer.eos_token, vocabulary(tokenizer)
        end_turns(tokenizer)
        assert (tokenizer.eos_token, vocabulary(tokenizer)) == before, "these name the same"
    tokenizer = llama_tokenizer(TURNS)
    before = vocabulary(tokenizer)
    assert tokenizer.eos_token == "<|eot|>"
    end_turns(tokenizer)
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token == "<|pad|>"
    assert vocabulary(tokenizer) != before, "what was trained with another end is another stage"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    prompt = user_turn(tokenizer, "Hi")[1]
    ((head, (tail,)),) = encode_all(tokenizer, [(prompt, ("Yes",))], 512)
    assert [*head, *tail][1:] == whole[: len(head) + len(tail) - 1], "what the template writes"


def test_answers_of_a_cell_are_closed_by_the_end_of_a_turn(tiny_scenario: Scenario) -> None:
    tokenizer = llama_tokenizer(TURNS)
    tokenizer.add_bos_token = False
    model = new_llama(SPECS["nano-llama"], len(tokenizer))
    config = RunConfig(scenario="mini", strategy="sequential", model="nano-llama")
    given = (config, replace(tiny_scenario, chat=True), plugins.load("strategy", "sequential"), {})
    strategy = strategy_of(*given, model, tokenizer)
    row, job = next(iter(jobs(strategy.scenario.tasks[0], 0, lambda half: [])))
    ids = tokens(strategy.tokenizer, row[:1], job)[0]["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert ids[-1] == end and end in endings(model, strategy.tokenizer)
