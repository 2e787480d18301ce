"""Terms: what a method adds to a job: a penalty or another loss, a change of its gradients, weights that follow.

Plain data that decides the result: a function of a plug-in's file, options and tensors. It is digested for the
stage's key, and written down for the processes of a launched job; nothing is pickled.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torch import Tensor

from cl_graft import plugins
from cl_graft.config import Launch
from cl_graft.errors import CLGraftError
from cl_graft.skillpack.folders.checkpoint import Checkpoint, write_weights
from cl_graft.skillpack.format.file import fingerprint
from cl_graft.store.digests import digest
from cl_graft.store.files import read_json, write_json

LIST = "terms.json"
FOLLOWED = "followed.safetensors"  # of a stage or a step checkpoint: states that terms change
Kind = Literal["penalty", "loss", "project", "follow"]


@dataclass(frozen=True)
class Term:
    """One function that acts in every step of a stage, with what it is given.

    function: defined at the top level of a Python file, so that another process finds it by file and name.
    kind `penalty`: `function(model, batch, output, state, **options)` is added to the loss, a scalar tensor or
        {name: scalar tensor} whose sum is added; each value is a column of the log, `ewc` or `o_lora.orthogonal`.
        A value that needs no gradient (of `detach`) is a column alone, and no part of the loss.
    kind `loss`: the same, in the place of the mean NLL of SFT's answer tokens; a stage has at most one. DPO's loss is
        what it is. Without `logits` the trainer makes no forward pass of its own.
    kind `project`: `function(model, gradients, state, step, **options)` changes the gradients of a whole step in
        place, {parameter name: tensor}, before they are clipped; `step` counts from 0.
    kind `follow`: `function(model, state, step, **options)` is called when the optimizer has stepped for the `step`th
        time, without gradients, and changes its state in place, as a moving average of the weights does. The state is
        part of step checkpoints and of the finished stage (`followed`).
    state: tensors of any shape and dtype; the function gets them on the model's device. Terms that are given the very
        same mapping share it: what one changes the other reads. options: plain JSON.
    logits: of a penalty or loss, whether `output.logits`, (batch, length, vocabulary), is wanted. TRL's loss is
        computed in chunks from the hidden states and makes none, so the head then runs unfused: these floats, and
        about twice as many again for their gradient, are held in every micro-batch.
    gradients: of a projection, how many gradients of all parameters it holds beside the one given; for `cl-graft plan`.

    model: the plain module or PEFT model, whose parameters are named as in `gradients`. batch: input_ids,
    attention_mask and labels (-100 outside the answer), each int64 (batch, length); rows, int64 (batch,), which
    rows of the stage these are; tokens, the answer tokens of a micro-batch, averaged over those of the step. A DPO
    batch of n pairs has 2n rows, the chosen answers first, and what else TRL passes.
    Raises CLGraftError for a function that cannot be found again, and for options that are no JSON.
    """

    function: Callable[..., Any]
    kind: Kind
    state: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    logits: bool = False
    gradients: int = 1

    def __post_init__(self) -> None:
        named, module = self.function.__qualname__, getattr(self.function, "__globals__", {})
        if module.get(named) is not self.function or not Path(module.get("__file__", "")).is_file():
            raise CLGraftError(
                f"a term's function {named!r} is not defined at the top level of a Python file; move it there, "
                "so that a stage of several processes can find it by name."
            )
        try:
            plain = json.loads(json.dumps(dict(self.options), allow_nan=False))
        except (TypeError, ValueError):
            plain = None
        if plain != dict(self.options):
            raise CLGraftError(
                f"the options of the term {self.name!r}, {dict(self.options)!r}, are no plain JSON; "
                "use numbers, texts, lists and objects, and give tensors as state."
            )

    @classmethod
    def penalty(
        cls,
        function: Callable[..., Any],
        state: Mapping[str, Tensor] | None = None,
        logits: bool = False,
        **options: Any,
    ) -> Term:
        """Make a term that is added to the loss."""
        return cls(function, "penalty", state or {}, options, logits)

    @classmethod
    def loss(
        cls,
        function: Callable[..., Any],
        state: Mapping[str, Tensor] | None = None,
        logits: bool = False,
        **options: Any,
    ) -> Term:
        """Make a term that takes the place of SFT's loss."""
        return cls(function, "loss", state or {}, options, logits)

    @classmethod
    def project(
        cls,
        function: Callable[..., Any],
        state: Mapping[str, Tensor] | None = None,
        gradients: int = 1,
        **options: Any,
    ) -> Term:
        """Make a term that changes the gradients."""
        return cls(function, "project", state or {}, options, gradients=gradients)

    @classmethod
    def follow(
        cls, function: Callable[..., Any], state: Mapping[str, Tensor], **options: Any
    ) -> Term:
        """Make a term that changes its state after every step."""
        return cls(function, "follow", state, options)

    @property
    def file(self) -> Path:
        return Path(self.function.__globals__["__file__"]).resolve()  # type: ignore[attr-defined]

    @property
    def name(self) -> str:
        """What the log calls it: the file, and the function where that is not the one to expect."""
        called = self.function.__name__
        return (
            self.file.stem
            if called in (self.kind, self.file.stem)
            else f"{self.file.stem}.{called}"
        )

    @cached_property
    def digest(self) -> str:
        """Digest of everything that decides what the term does."""
        given = (self.kind, dict(self.options), self.logits)
        return digest(
            plugins.sources_of(self.file), self.name, *given, fingerprint(self.state.items())
        )

    @property
    def about(self) -> dict[str, Any]:
        """What a finished stage tells of it: name, kind, options, digest."""
        return {
            "name": self.name,
            "kind": self.kind,
            "options": dict(self.options),
            "digest": self.digest,
        }


def holder(terms: Sequence[Term], term: Term) -> int:
    """The number of the first of these terms that holds the term's state."""
    return next(n for n, other in enumerate(terms) if other.state is term.state)


def followed(terms: Sequence[Term], stage: Path) -> list[Term]:
    """The terms with the states that they had at the end of a stage; as they are where none of them follows it."""
    file = stage / FOLLOWED
    if not any(t.kind == "follow" for t in terms) or not file.is_file():
        return list(terms)
    from safetensors.torch import load_file

    states: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(file).items():
        number, _, name = key.partition("/")
        states.setdefault(int(number), {})[name] = value
    numbers = [holder(terms, term) for term in terms]
    return [
        replace(term, state=states[number]) if number in states else term
        for term, number in zip(terms, numbers, strict=True)
    ]


def check(kinds: Collection[str], launch: Launch, whose: str) -> None:
    """Raises CLGraftError for kinds of terms that cannot act in such a launch. whose: what uses them, for the error."""
    if kinds and launch.processes and launch.zero == 3:
        raise CLGraftError(
            f"{whose} needs whole parameters and gradients in training, and ZeRO-3 leaves a part of each with a "
            "process; launch with zero=2."
        )
    if "project" in kinds and launch.processes and launch.offload:
        raise CLGraftError(
            f"{whose} changes gradients, whose norm DeepSpeed has already taken where the optimizer is offloaded; "
            "launch with offload=false."
        )


def replaced(terms: Sequence[Term]) -> bool:
    """Whether one takes the place of SFT's loss. Raises CLGraftError where two would."""
    losses = [term.name for term in terms if term.kind == "loss"]
    if len(losses) > 1:
        raise CLGraftError(
            f"{losses[0]} and {losses[1]} would both take the place of the loss; make one of them a penalty."
        )
    return bool(losses)


def save(terms: Sequence[Term], folder: Path) -> None:
    """Write terms.json, and a folder of safetensors for each state, into a new folder."""
    folder.mkdir(parents=True)
    holders = [holder(terms, term) for term in terms]
    for number, term in enumerate(terms):
        if holders[number] == number:
            save_state(term.state, folder / str(number))
    told = [
        {
            "state": holders[number],
            "module": term.function.__module__,
            "file": str(term.file),
            "function": term.function.__name__,
            "kind": term.kind,
            "options": dict(term.options),
            "logits": term.logits,
        }
        for number, term in enumerate(terms)
    ]
    write_json(folder / LIST, told)


def save_state(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a folder of safetensors; empty for a state without tensors."""
    folder.mkdir(parents=True)
    specs = {name: (x.dtype, tuple(x.shape)) for name, x in state.items()}
    if specs:
        write_weights(folder, specs, lambda name: state[name].detach().cpu().contiguous())


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read what `save_state` wrote."""
    if not any(folder.iterdir()):
        return {}
    weights = Checkpoint(folder)
    return {name: weights.read(name) for name in weights.tensors}


def load(folder: Path) -> tuple[Term, ...]:
    """Read what `save` wrote; the functions are imported from their files."""
    terms: list[Term] = []
    for number, told in enumerate(read_json(folder / LIST)):
        shared = told["state"] < number
        terms.append(
            Term(
                getattr(_module(Path(told["file"]), told["module"]), told["function"]),
                told["kind"],
                terms[told["state"]].state if shared else read_state(folder / str(number)),
                told["options"],
                told["logits"],
            )
        )
    return tuple(terms)


def _module(path: Path, name: str) -> ModuleType:
    """Import the file, by its module's name where that leads to it, as of an installed package, else by its path."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec and spec.origin and Path(spec.origin).resolve() == path:
        return importlib.import_module(name)
    return plugins.import_file(path, name)
