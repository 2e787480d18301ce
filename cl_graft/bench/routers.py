"""Routers beside each other: how often they are right, what they keep, what they refuse, how long they take."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from cl_graft import plugins
from cl_graft.config import RunConfig
from cl_graft.data import records, sample
from cl_graft.evaluation.examiner import Group
from cl_graft.evaluation.features import Features
from cl_graft.experiment.prepare import prepare, strategy_of
from cl_graft.models.load import load
from cl_graft.routing.base import BaseRouter, PackRouter, Selection, State, View
from cl_graft.skillpack.codecs.exact import exact_spec
from cl_graft.skillpack.format.file import SkillPack, packed_size
from cl_graft.store.digests import machine, versions
from cl_graft.store.files import read_json, write_json, write_text
from cl_graft.task import Example, Task

SHARES = (0.01, 0.05)  # of the tasks' own prompts, that a threshold may leave to the base
TIMED = 30  # test prompts of each task whose routing is timed
TITLE = re.compile(r"^Title: .*? Text: ")
ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("ridge", {}),
    ("centroids", {}),
    ("mahalanobis", {}),
    ("mahalanobis", {"projection": 512}),
    ("classifier", {}),
    ("arrow", {"spectrum": "top"}),
    ("arrow", {"spectrum": "full"}),
    ("arrow", {"spectrum": "scaled"}),
    ("likelihood", {}),
]
ABOUT = (
    "Which task a prompt is of, told from the prompt. Accuracy, AUC and what goes to the base in per cent; ± is one "
    "standard error over seeds, which draw the training prompts, for these test prompts alone. Points lost: scores of "
    "the packs that are chosen below those of the packs that are named, in points of 100, the mean over tasks. Bytes: "
    "the file of the state. Time over a forward: of routing new prompts, over that of the base's pass over them. AUC: "
    "of the best score, the tasks' own test prompts against strange ones, which are those of general ability or, where "
    "a stream has none, GSM8K's questions. Own, strange to the base at 0.01: the share of them below the threshold "
    "that leaves that share of the tasks' validation prompts to the base."
)


@dataclass(frozen=True)
class Stream:
    """Tasks in their order, and prompts of none of them: general ability's, or else GSM8K's questions."""

    scenario: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    untitled: bool = False  # without the titles that Amazon's texts have and Yelp's have not


FIVE = "agnews,amazon,sst2,dbpedia,mnli"
STREAMS = {
    "mini": Stream("mini", "mini-llama"),
    "text_classification": Stream("text_classification", "text-llama"),
    "text_classification and yelp": Stream(
        "text_classification", "text-llama", {"tasks": f"{FIVE},yelp"}
    ),
    "amazon and yelp": Stream("text_classification", "text-llama", {"tasks": "amazon,yelp"}),
    "amazon and yelp, untitled": Stream(
        "text_classification", "text-llama", {"tasks": "amazon,yelp"}, untitled=True
    ),
}


def bench_routers(
    only: Sequence[str],
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
    rows, bases = [], dict[str, tuple[Any, Any, Features]]()
    for name in only:
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in seeds:
            say(f"{name}, seed {seed}")
            for label, figures in _of_seed(STREAMS[name], seed, data_dir, cells, allow_code, bases):
                found.setdefault(label, []).append(figures)
        rows += [
            {"stream": name, "router": label, "seeds": len(each), "figures": _summary(each)}
            for label, each in found.items()
        ]
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table a stream: a row a router, a column a figure, with its standard error over seeds."""
    parts = []
    for stream in dict.fromkeys(row["stream"] for row in rows):
        mine = [
            row["figures"] | {"seeds": [row["seeds"], None]}
            for row in rows
            if row["stream"] == stream
        ]
        columns = [*dict.fromkeys(name for figures in mine for name in figures)]
        lines = [["router", *columns], ["---", *["--:"] * len(columns)]]
        for row, figures in zip((r for r in rows if r["stream"] == stream), mine, strict=True):
            lines.append(
                [row["router"], *(_shown(n, *figures.get(n, (None, None))) for n in columns)]
            )
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"## {stream}\n\n{table}\n")
    return "\n".join(parts)


def write(rows: Sequence[dict[str, Any]], folder: Path, command: str) -> None:
    """Writes routers.md and routers.json: each stream's rows with the command, versions and machine that made them.

    Streams that are in the folder and were not measured now stay as they are.
    """
    file, about = folder / "routers.json", {"command": command, **versions(), **machine()}
    streams = read_json(file) if file.is_file() else {}
    for row in rows:
        mine = [other for other in rows if other["stream"] == row["stream"]]
        streams[row["stream"]] = {"rows": mine, "made_by": about}
    write_json(file, streams)
    parts = [f"# Routers\n\n{ABOUT}\n"]
    for name in sorted(streams, key=[*STREAMS].index):
        told = "; ".join(f"{k}: {v}" for k, v in streams[name]["made_by"].items())
        parts.append(f"{markdown(streams[name]['rows'])}\nMade by {told}.\n")
    write_text(folder / "routers.md", "\n".join(parts))


def _shown(name: str, value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    if name in ("bytes", "seeds"):
        return f"{value:,.0f}"
    scale, digits = (1, 2) if "time" in name or "points" in name else (100, 1)
    told = f"{scale * value:.{digits}f}"
    return told if error is None else f"{told} ± {scale * error:.{digits}f}"


def _summary(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{figure: [mean, standard error over the seeds that have it]}; the error is None where there is but one."""
    told = {}
    for name in dict.fromkeys(name for figures in each for name in figures):
        values = [figures[name] for figures in each if name in figures]
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        told[name] = [mean(values), error]
    return told


def _of_seed(
    stream: Stream,
    seed: int,
    data_dir: Path | None,
    cells: Path | None,
    allow_code: bool,
    bases: dict[str, tuple[Any, Any, Features]],
) -> list[tuple[str, dict[str, Any]]]:
    """bases: {model: itself, its tokenizer, and the features that it has for prompts}, to be filled."""
    config = RunConfig(
        scenario=stream.scenario,
        strategy="graftllm",
        model=stream.model,
        seed=seed,
        options={stream.scenario: stream.options} if stream.options else {},
        data_dir=data_dir,
        allow_code_execution=allow_code,
        wandb="off",
    )
    torch.set_num_threads(1)
    scenario, kind, chosen = prepare(config)
    if stream.model not in bases:
        loaded = load(config.model, data_dir)
        bases[stream.model] = (*loaded, Features(*loaded))
    model, tokenizer, features = bases[stream.model]
    with TemporaryDirectory() as out:
        temporary = config.model_copy(update={"out": Path(out)})
        strategy = strategy_of(temporary, scenario, kind, chosen, model, tokenizer)
        tasks = [_untitled(t) if stream.untitled else t for t in strategy.scenario.tasks]
        files = sorted(((cells or Path(out)) / config.cell / "packs").glob("*.safetensors"))
        strategy.packs = [SkillPack.load(file, base=strategy.grafted.base) for file in files]
        scores = _scores(strategy) if files else []
        strategy.restore_base()
        packs = [strategy.compose(number) for number in range(len(files))]
        general = strategy.scenario.general
        asked = Asked(
            View(strategy.grafted, tokenizer, features, packs),
            tasks,
            [e.prompt for e in general.test] if general else _questions(data_dir),
            scores,
            seed,
        )
        return [
            (name + "".join(f"({k}={v})" for k, v in its.items()), asked.figures(router))
            for name, its in ROUTERS
            if not isinstance(router := plugins.load("router", name)(**its), PackRouter) or packs
        ]


@dataclass(frozen=True)
class Asked:
    """A stream of one seed. strange: prompts of none of its tasks. scores: [task][pack][example], where there are
    packs."""

    view: View
    tasks: Sequence[Task]
    strange: Sequence[str]
    scores: Sequence[Sequence[Sequence[float]]]
    seed: int

    def figures(self, router: BaseRouter) -> dict[str, Any]:
        """What is measured of a router that learns all tasks in their order."""
        state: State = {}
        for number, task in enumerate(self.tasks):
            prompts = router.sample([e.prompt for e in task.train], self.seed)
            state = router.learn(state, prompts, self.view, number)
        judged = [
            router.judge(state, [e.prompt for e in t.test], self.view).double() for t in self.tasks
        ]
        taken = [x.argmax(1).tolist() for x in judged]
        right = [mean(float(t == k) for t in chosen) for k, chosen in enumerate(taken)]
        held = [e.prompt for task in self.tasks for e in task.validation]
        own, strange = torch.cat(judged), router.judge(state, self.strange, self.view)
        return {
            "accuracy": mean(right),
            **{f"accuracy, {t.name}": x for t, x in zip(self.tasks, right, strict=True)},
            **({"points lost": self._lost(taken)} if self.scores else {}),
            "bytes": _bytes(state) if state else 0,
            "time over a forward": self._time(router, state),
            **_rejected(own, strange.double(), router.judge(state, held, self.view)),
        }

    def _lost(self, taken: Sequence[Sequence[int]]) -> float:
        """Points of 100 below what the packs score that are named, the mean over tasks."""
        lost = []
        for own, (chosen, by_pack) in enumerate(zip(taken, self.scores, strict=True)):
            lost.append(mean(by_pack[own]) - mean(by_pack[k][i] for i, k in enumerate(chosen)))
        return 100 * mean(lost)

    def _time(self, router: BaseRouter, state: State) -> float:
        """Processor time of routing prompts that were not read before, over that of the base reading them."""
        prompts = [e.prompt for task in self.tasks for e in task.test[:TIMED]]
        router.judge(state, prompts[:1], self.view)  # what is made once, as singular vectors are
        times = []
        for way in (
            lambda new: router.judge(state, prompts, new),
            lambda new: new.features(prompts),
        ):
            new = replace(
                self.view, features=Features(self.view.grafted.model, self.view.tokenizer)
            )
            begun = process_time()
            way(new)
            times.append(process_time() - begun)
        return times[0] / times[1]


def _rejected(own: Tensor, strange: Tensor, held: Tensor) -> dict[str, float]:
    """The area under the ROC of the best score, and what thresholds on validation prompts leave to the base."""
    best, other = own.amax(1), strange.amax(1)
    ranks = rankdata(torch.cat([best, other]).numpy())[: len(best)]
    found = {"AUC": float((ranks.mean() - (len(best) + 1) / 2) / len(other))}
    for share in SHARES:
        at = Selection(reject=share).threshold(held)
        found[f"own to the base at {share:g}"] = (best < at).double().mean().item()
        found[f"strange to the base at {share:g}"] = (other < at).double().mean().item()
    return found


def _untitled(task: Task) -> Task:
    def plain(examples: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(replace(e, prompt=TITLE.sub("Text: ", e.prompt)) for e in examples)

    train, test, validation = map(plain, (task.train, task.test, task.validation))
    return replace(task, train=train, test=test, validation=validation)


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
    """Bytes of the file that holds a state."""
    specs = {name: exact_spec(tuple(x.shape), x.dtype) for name, x in state.items()}
    return packed_size(specs, task="", method="", options={}, base="0" * 32, versions={})


def _questions(data_dir: Path | None) -> list[str]:
    rows = list(records(data_dir, "gsm8k/test.jsonl", {"question": str}))
    return [f"{row['question']}\nAnswer:" for row in sample(rows, 250, "strange")]
