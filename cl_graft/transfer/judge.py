"""How good an answer is: right or wrong by a rule, or as good as a reward model finds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cl_graft.errors import CLGraftError, first_line
from cl_graft.evaluation.scorers import Examinee, score
from cl_graft.models.chat import is_chat
from cl_graft.models.load import locate
from cl_graft.models.text import encode
from cl_graft.task import Example, Scoring
from cl_graft.transfer.sources import SourceError, reader, worded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

BATCH = 16
LONGEST = 4096  # tokens that a reward model reads where its config does not say

Judge = Callable[[Example, Sequence[str]], list[float]]  # rewards of some answers to one prompt


class JudgeError(CLGraftError):
    """A verifier or reward model that came to no verdict."""


def rule_judge(rule: Scoring, allow_code: bool) -> Judge:
    """The score by the rule, a scorer of answers: 1.0 is right. Raises JudgeError, naming the prompt."""

    def judge(example: Example, answers: Sequence[str]) -> list[float]:
        nobody = cast(Any, None)  # the answers are given
        examinee = Examinee(nobody, nobody, 0, 0, allow_code, given=answers)
        try:
            (scored,) = score(examinee, [example] * len(answers), [rule]).values()
        except CLGraftError as error:
            raise JudgeError(
                f"the rule {rule.label!r} fails on answers to prompt {example.prompt[:60]!r}: {error}"
            ) from error
        return [one.score for one in scored]

    return judge


def check_reward_model(
    name: str, data_dir: Path | None
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of a sequence classifier with one output. Raises SourceError for any other model."""
    config, tokenizer = reader(name, data_dir)
    kind = (config.architectures or ["no class"])[0]
    if not kind.endswith("ForSequenceClassification"):
        raise SourceError(
            f"{name} is no reward model: its config names {kind}; give a sequence classifier with one output."
        )
    if config.num_labels != 1:
        raise SourceError(
            f"{name} has {config.num_labels} outputs and a reward model has one; give a sequence classifier with "
            "num_labels 1."
        )
    return config, tokenizer


def reward_judge(name: str, data_dir: Path | None, chat: bool | None) -> Judge:
    """The reward model's one output for prompt and answer; for the two as a conversation as `sources.worded` has it.

    Answers are scored in batches of one prompt, so a reward depends on nothing else in the build. An input too
    long for the model loses the start of its prompt.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    config, tokenizer = check_reward_model(name, data_dir)
    on_gpu = torch.cuda.is_available()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            locate(name, data_dir),
            trust_remote_code=False,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # torn weights, no network, ...: each library has errors of its own
        reason = first_line(error)
        raise SourceError(
            f"reward model {name!r} cannot be loaded ({type(error).__name__}: {reason}); give a complete Hugging "
            "Face folder or a hub id."
        ) from error
    if info["missing_keys"]:
        raise SourceError(
            f"reward model {name!r} lacks weights ({', '.join(sorted(info['missing_keys'])[:3])}); give a complete one."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    model = model.eval().to("cuda" if on_gpu else "cpu")
    longest = getattr(config, "max_position_embeddings", None) or LONGEST

    @torch.no_grad()
    def judge(example: Example, answers: Sequence[str]) -> list[float]:
        rewards: list[float] = []
        for start in range(0, len(answers), BATCH):
            rows = [
                {"input_ids": _ids(tokenizer, name, example.prompt, answer, longest, chat)}
                for answer in answers[start : start + BATCH]
            ]
            inputs = tokenizer.pad(rows, return_tensors="pt").to(model.device)
            rewards += model(**inputs).logits[:, 0].float().tolist()
        if not all(map(math.isfinite, rewards)):
            raise JudgeError(
                f"reward model {name!r} gives no finite reward to an answer to prompt {example.prompt[:60]!r}; "
                "use another, or leave the prompt out."
            )
        return rewards

    return judge


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompt: str,
    answer: str,
    longest: int,
    chat: bool | None,
) -> list[int]:
    if not is_chat(tokenizer, chat):
        return sum(encode(tokenizer, prompt, answer, longest), [])
    worded(tokenizer, name, prompt, chat)  # says so where there is no template
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"][-longest:]
