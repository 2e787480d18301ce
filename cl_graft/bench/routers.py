"""Routers beside each other: how often they are right, what they keep, what they refuse, how long they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch
from scipy.stats import rankdata

from cl_graft import plugins
from cl_graft.config import RunConfig
from cl_graft.data import records, sample
from cl_graft.evaluation.examiner import Group
from cl_graft.evaluation.features import Features
from cl_graft.experiment.prepare import prepare, strategy_of
from cl_graft.models.load import load
from cl_graft.routing.base import PackRouter, Selection, View
from cl_graft.skillpack.codecs.exact import exact_spec
from cl_graft.skillpack.format.file import SkillPack, packed_size
from cl_graft.task import Task

QUANTILES = (
    0.01,
    0.05,
    0.1,
)  # shares of the tasks' own prompts that a threshold may leave to the base
ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("ridge", {}),
    ("centroids", {}),
    ("mahalanobis", {}),
    ("mahalanobis", {"projection": 512}),
    ("classifier", {}),
    ("arrow", {"spectrum": "top"}),
    ("arrow", {"spectrum": "full"}),
    ("likelihood", {}),
]


@dataclass(frozen=True)
class Stream:
    """Tasks in their order, and prompts of none of them: general ability's, or else GSM8K's questions."""

    scenario: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


FIVE = "agnews,amazon,sst2,dbpedia,mnli"
STREAMS = {
    "mini": Stream("mini", "mini-llama"),
    "text_classification": Stream("text_classification", "text-llama"),
    "text_classification and yelp": Stream(
        "text_classification", "text-llama", {"tasks": f"{FIVE},yelp"}
    ),
    "amazon and yelp": Stream("text_classification", "text-llama", {"tasks": "amazon,yelp"}),
}


def bench_routers(
    only: Sequence[str] = tuple(STREAMS),
    seeds: Sequence[int] = (0, 1, 2),
    data_dir: Path | None = None,
    cells: Path | None = None,
    allow_code: bool = False,
    say: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """A row for each stream and router: means over seeds, each with its standard error.

    cells: a folder of results; packs of `graftllm` of the same stream and seed, where it has them, are what routers
    that look at packs are asked about, and what scores are measured with.
    """
    rows = []
    for name in only:
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in seeds:
            say(f"{name}, seed {seed}")
            for label, figures in _of_seed(STREAMS[name], seed, data_dir, cells, allow_code):
                found.setdefault(label, []).append(figures)
        rows += [
            {"stream": name, "router": label, "seeds": len(each)} | _summary(each)
            for label, each in found.items()
        ]
    return rows


def _summary(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{figure: [mean, standard error over seeds]}; None of a single seed has no error."""
    told = {}
    for name in each[0]:
        values = [figures[name] for figures in each]
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        told[name] = [mean(values), error]
    return told


def _of_seed(
    stream: Stream, seed: int, data_dir: Path | None, cells: Path | None, allow_code: bool
) -> list[tuple[str, dict[str, Any]]]:
    options = {stream.scenario: stream.options} if stream.options else {}
    config = RunConfig(
        scenario=stream.scenario,
        strategy="graftllm",
        model=stream.model,
        seed=seed,
        options=options,
        data_dir=data_dir,
        allow_code_execution=allow_code,
        wandb="off",
    )
    torch.set_num_threads(1)
    scenario, kind, chosen = prepare(config)
    model, tokenizer = load(config.model, data_dir)
    with TemporaryDirectory() as out:
        temporary = config.model_copy(update={"out": Path(out)})
        strategy = strategy_of(temporary, scenario, kind, chosen, model, tokenizer)
        tasks = strategy.scenario.tasks
        files = sorted(((cells or Path(out)) / config.cell / "packs").glob("*.safetensors"))
        strategy.packs = [SkillPack.load(file, base=strategy.grafted.base) for file in files]
        if len(strategy.packs) != len(tasks):
            strategy.packs = []
        scores = _scores(strategy) if strategy.packs else []
        strategy.restore_base()
        packs = [strategy.compose(number) for number in range(len(strategy.packs))]
        view = View(strategy.grafted, tokenizer, strategy.features, packs)
        general = strategy.scenario.general
        strange = [e.prompt for e in general.test] if general else _questions(data_dir)
        found = []
        for name, its in ROUTERS:
            router = plugins.load("router", name)(**its)
            if packs or not isinstance(router, PackRouter):
                label = name + "".join(f"({k}={v})" for k, v in its.items())
                found.append((label, _measured(router, view, tasks, strange, scores, seed)))
    return found


def _measured(
    router: Any,
    view: View,
    tasks: Sequence[Task],
    strange: Sequence[str],
    scores: Sequence[Sequence[Sequence[float]]],
    seed: int,
) -> dict[str, Any]:
    """scores[task][pack][example], where there are packs."""
    state: dict[str, torch.Tensor] = {}
    for number, task in enumerate(tasks):
        state = router.learn(
            state, router.sample([e.prompt for e in task.train], seed), view, number
        )
    prompts = [e.prompt for task in tasks for e in task.test]
    owners = torch.tensor([number for number, task in enumerate(tasks) for _ in task.test])
    fresh = replace(view, features=Features(view.grafted.model, view.tokenizer))
    router.judge(state, prompts[:64], view)  # what is made once, as singular vectors are
    begun = process_time()
    judged = router.judge(state, prompts, fresh)
    middle = process_time()
    Features(view.grafted.model, view.tokenizer)(prompts)
    forward = process_time() - middle
    taken, own = judged.argmax(1), judged.double().amax(1)
    right = (taken == owners).double()
    told = {
        "accuracy": right.mean().item(),
        **{f"accuracy of {t.name}": right[owners == k].mean().item() for k, t in enumerate(tasks)},
        "bytes": _bytes(state) if state else 0,
        "seconds_over_forward": (middle - begun) / forward,
    }
    other = router.judge(state, strange, view).double().amax(1)
    ranks = rankdata(torch.cat([own, other]).numpy())
    told["auc"] = (ranks[: len(own)].sum() / len(own) - (len(own) + 1) / 2) / len(other)
    held = router.judge(state, [e.prompt for t in tasks for e in t.validation], view)
    for quantile in QUANTILES:
        at = Selection(reject=quantile).threshold(held)
        told[f"own to the base at {quantile}"] = (own < at).double().mean().item()
        told[f"strange to the base at {quantile}"] = (other < at).double().mean().item()
    if scores:
        answered, place = [], 0
        for k, task in enumerate(tasks):
            chosen = taken[place : place + len(task.test)].tolist()
            place += len(task.test)
            points = [scores[k][pack][i] - scores[k][k][i] for i, pack in enumerate(chosen)]
            answered.append(mean(points))
        told["points_lost"] = -100 * mean(answered)
    return told


def _scores(strategy: Any) -> list[list[list[float]]]:
    """[task][pack][example]: the score of each test example under each task's pack."""
    found = []
    for task in strategy.scenario.tasks:
        each = []
        for number in range(len(strategy.packs)):
            group = Group(strategy.compose(number), range(len(task.test)), number)
            outcomes = strategy.examiner.measure(task, [group], len(strategy.packs))
            each.append([o.score for o in outcomes[task.metrics[0]]])
        found.append(each)
    return found


def _bytes(state: dict[str, torch.Tensor]) -> int:
    """Of the file that holds a state."""
    specs = {name: exact_spec(tuple(x.shape), x.dtype) for name, x in state.items()}
    return packed_size(specs, task="", method="", options={}, base="0" * 32, versions={})


def _questions(data_dir: Path | None) -> list[str]:
    rows = list(records(data_dir, "gsm8k/test.jsonl", {"question": str}))
    return [f"{row['question']}\nAnswer:" for row in sample(rows, 250, "strange")]
