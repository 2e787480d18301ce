"""Evaluation beside plain `generate` and plain scoring, in one run: processor seconds, equal results, peak memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import torch

from cl_graft.evaluation import generate
from cl_graft.evaluation.batches import BATCH, left_padded
from cl_graft.models.chat import render
from cl_graft.models.load import load, load_tokenizer, locate
from cl_graft.models.text import encode_prompts
from cl_graft.skillpack.codecs import sparse
from cl_graft.skillpack.folders.loaded import as_loaded
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.grafted import Grafted

MODEL = "smollm2-135m"
MOST = 256  # tokens of an answer
LONGEST = 1024  # tokens of a prompt and a choice
CHOICES = ["very good", "good", "bad", "very bad"]

# questions whose answers are from two tokens to as many as there may be
ASKED = {
    "What is {}? Answer with the number only.": "7 + 5,12 + 30,9 - 8,45 + 17,6 * 7,100 - 1,15 + 15,81 / 9",
    "What is the capital of {}?": "France,Japan,Egypt,Brazil,Canada,Italy,Kenya,Norway",
    "Is this review positive or negative? {}.": "I loved this film,The food was cold and bland,A waste of two hours,"
    "Great value for the price,Best concert of my life,The plot made no sense,The room smelled of smoke,It was fine",
    "Write one sentence about {}.": "the sea,a train,winter,a library,coffee,the moon,a garden,a bicycle",
    "Name three {}.": "colours,fruits,planets,animals,instruments,sports,tools,European cities",
    "Explain {} in two sentences.": "photosynthesis,gravity,inflation,evaporation,a prime number,democracy,an atom,"
    "a volcano",
    "Write a Python function that {}.": "adds two numbers,reverses a string,counts vowels,sorts a list,"
    "finds the maximum of a list,checks if a number is even,computes a factorial,joins words with spaces",
}
# what was said, and which of the choices it is
SHOTS = (
    ("The plot moves quickly, the actors are superb, and I left the cinema smiling.", 0),
    ("A decent evening out, although the second half could have been shorter.", 1),
    ("The room smelled of smoke and nobody at the desk cared to help us.", 2),
    ("Two hours that I will never get back; the worst film of the whole year.", 3),
    ("The battery lasts for days and the screen is the best that I have ever seen.", 0),
    ("It does what it says on the box, and the price is fair for what you get.", 1),
    ("The handle came off within a week, and the replacement was no better.", 2),
    ("It arrived broken, smelled of glue, and the shop refused to take it back.", 3),
)
JUDGED = (
    "The soup was warm and the bread was fresh.",
    "I fell asleep before the end.",
    "Every single song is a masterpiece.",
    "The keys stick and the lid is scratched.",
    "Our guide knew everything about the castle.",
    "It rained through the roof of the tent.",
    "A quiet, honest film about growing old.",
    "The seat is so hard that my back hurts.",
)

Way = Callable[[Any, Any], Any]


def bench_evaluate(
    model_name: str = MODEL, turns: int = 3, say: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Ratios of median processor seconds over runs in turn, on one thread, in float32.

    evaluate_speedup: plain `generate`, in batches of 64 by length, over `answers`, on questions of mixed kinds.
    choices_speedup: a row for each pair of prompt and choice, in batches of 64 by length, with logits of the choices'
    tokens alone, over `choice_likelihoods`, on prompts with the same eight examples before them. `_alone`: where
    prompts share nothing, so that what comes of the shared beginning is the rest. equal_answers: share of them.
    likelihoods_apart: the most that two differ, in nats. peaks_over_weights: resident memory at most, beyond what the
    process held before it loaded the model, over the weights. Raises NotFetched.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, tokenizer = load(model_name)
        model.float().eval()
        seconds, results = _timed(model, tokenizer, turns, say)
        del model
    finally:
        torch.set_num_threads(before)
    said, plain = results["answers"], results["answers, plain"]
    return {
        **{
            name: seconds[f"{of.split(',')[0]}, plain"] / seconds[of] for name, of in RATIOS.items()
        },
        "equal_answers": sum(a == b for a, b in zip(said, plain, strict=True)) / len(said),
        "likelihoods_apart": max(
            abs(a - b)
            for name in ("choices, alone", "choices, plain")
            for a, b in zip(sum(results["choices"], []), sum(results[name], []), strict=True)
        ),
        "equal_choices": sum(
            _best(a) == _best(b)
            for a, b in zip(results["choices"], results["choices, plain"], strict=True)
        )
        / len(results["choices"]),
        "peaks_over_weights": {
            name: _peak_apart(name, model_name) for name in ("answers", "choices")
        },
        "seconds": seconds,
        "conditions": {
            "model": model_name,
            "prompts": len(said),
            "max_new_tokens": MOST,
            "new_tokens": _lengths(tokenizer, said),
            "choice_prompts": len(JUDGED),
            "choices": len(CHOICES),
            "turns": turns,
            "threads": 1,
        },
    }


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = [(name, f"{figures[name]:.2f}") for name in RATIOS]
    rows += [(name, f"{figures[name]:.1%}") for name in ("equal_answers", "equal_choices")]
    rows += [("likelihoods_apart", f"{figures['likelihoods_apart']:.1e} nats")]
    rows += [
        (f"{name}, peak over weights", f"{value:.2f}")
        for name, value in figures["peaks_over_weights"].items()
    ]
    rows += [(f"{name}, s", f"{value:.1f}") for name, value in figures["seconds"].items()]
    return "\n".join(
        f"| {name} | {value} |" for name, value in [("", "figure"), ("---", "--:"), *rows]
    )


def asked(tokenizer: Any) -> list[str]:
    """Questions, of a chat model as a user's turn."""
    texts = [form.format(what) for form, every in ASKED.items() for what in every.split(",")]
    return render(tokenizer, texts) if tokenizer.chat_template else [f"{t}\n" for t in texts]


def few_shot() -> list[str]:
    """Prompts that begin with the same eight examples."""
    shown = "".join(f"Review: {text}\nVerdict: {CHOICES[k]}\n\n" for text, k in SHOTS)
    head = "Say of each review how good the reviewer found what is reviewed.\n\n" + shown
    return [f"{head}Review: {text}\nVerdict: " for text in JUDGED]


def _answers(model: Any, tokenizer: Any) -> list[str]:
    return generate.generate(model, tokenizer, asked(tokenizer), MOST)


def _answers_alone(model: Any, tokenizer: Any) -> list[str]:
    return generate.generate(model, tokenizer, asked(tokenizer), MOST, told=lambda rows: None)


@torch.no_grad()
def _answers_plain(model: Any, tokenizer: Any) -> list[str]:
    prompts, said = encode_prompts(tokenizer, asked(tokenizer)), dict[int, str]()
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        ids, mask = left_padded([prompts[i] for i in some], tokenizer.pad_token_id)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=MOST,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=generate.endings(model, tokenizer),
        )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        said |= dict(zip(some, texts, strict=True))
    return [said[i] for i in range(len(prompts))]


def _choices(model: Any, tokenizer: Any) -> list[list[float]]:
    return generate.choice_likelihoods(model, tokenizer, few_shot(), CHOICES, LONGEST)


def _choices_alone(model: Any, tokenizer: Any) -> list[list[float]]:
    return generate.choice_likelihoods(
        model, tokenizer, few_shot(), CHOICES, LONGEST, told=lambda rows: None
    )


@torch.no_grad()
def _choices_plain(model: Any, tokenizer: Any) -> list[list[float]]:
    heads, tails = generate.choice_rows(tokenizer, few_shot(), CHOICES, LONGEST)
    pairs = [(i, k) for i in range(len(heads)) for k in range(len(tails))]
    pairs.sort(key=lambda pair: len(heads[pair[0]]) + len(tails[pair[1]]))
    found, keep = [[0.0] * len(tails) for _ in heads], max(map(len, tails)) + 1
    for start in range(0, len(pairs), BATCH):
        some = pairs[start : start + BATCH]
        ids, mask = left_padded([heads[i] + tails[k] for i, k in some], tokenizer.pad_token_id)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep
        ).logits
        scores = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1 - keep :, None])[..., 0]
        for row, (i, k) in zip(scores, some, strict=True):
            found[i][k] = row[-len(tails[k]) :].sum().item()
    return found


WAYS: dict[str, Way] = {
    "answers": _answers,
    "answers, alone": _answers_alone,
    "answers, plain": _answers_plain,
    "choices": _choices,
    "choices, alone": _choices_alone,
    "choices, plain": _choices_plain,
}
RATIOS = {
    "evaluate_speedup": "answers",
    "evaluate_speedup_alone": "answers, alone",
    "choices_speedup": "choices",
    "choices_speedup_alone": "choices, alone",
}


def _timed(
    model: Any, tokenizer: Any, turns: int, say: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median processor seconds of each way, and what it finds; ways that share nothing run once."""
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0)  # imports and kernels
    spent, found = dict[str, list[float]](), dict[str, Any]()
    for turn in range(turns):
        for name, way in WAYS.items() if turn % 2 else reversed(WAYS.items()):
            if turn and name.endswith("alone"):
                continue
            begun = process_time()
            found[name] = way(model, tokenizer)
            spent.setdefault(name, []).append(process_time() - begun)
            say(f"{name}, turn {turn + 1} of {turns}: {spent[name][-1]:.1f} s")
    return {name: median(spent[name]) for name in WAYS}, found


def _best(row: list[float]) -> int:
    return max(range(len(row)), key=row.__getitem__)


def _lengths(tokenizer: Any, said: list[str]) -> dict[str, float]:
    counts = sorted(len(ids) for ids in tokenizer(said, add_special_tokens=False)["input_ids"])
    return {"least": counts[0], "median": median(counts), "most": counts[-1], "sum": sum(counts)}


def _peak_apart(name: str, model_name: str) -> float:
    """The peak in a process of its own, of a base with a pack on, as in a cell."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, model_name))


def _peak(name: str, model_name: str) -> float:
    from cl_graft.models.embedded import toy_tokenizer
    from cl_graft.store.digests import forget_peak_memory, resident_bytes

    torch.set_num_threads(1)
    tiny, tokenizer = load("nano-llama")  # imports and buffers that any model makes
    generate.generate(tiny, toy_tokenizer(), ["a"], 2)
    tokenizer = load_tokenizer(model_name, str(locate(model_name)))
    pack = _of_one_weight(Grafted(load(model_name)[0]))
    before = resident_bytes("VmRSS")
    model, _ = load(model_name)
    weights = sum(p.nbytes for p in model.float().parameters())
    forget_peak_memory()
    grafted = Grafted(model, as_loaded(model))
    grafted.activate([pack])
    WAYS[name](model, tokenizer)
    grafted.unload()
    return (resident_bytes("VmHWM") - before) / weights


def _of_one_weight(grafted: Grafted) -> SkillPack:
    """A pack that changes one weight of every parameter, and so takes no memory to speak of."""
    tensors = {}
    for name, parameter in grafted.model.named_parameters():
        delta = torch.zeros(parameter.shape)
        delta.view(-1)[0] = 1e-6
        tensors[name] = sparse(delta, delta != 0, torch.float32)
    return SkillPack(tensors, "one weight", "bench", {}, grafted.base)
