"""Sampling: which prompts go together, under which seed, and the two engines that can answer.

A chunk is one source and a few prompts, and all that its answers depend on is itself: the same chunk has the
same seed and the same batch whether it is the first of a build or the first after a kill.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cl_graft.evaluation.batches import BATCH
from cl_graft.evaluation.generate import Answer, answers
from cl_graft.models.load import load, locate
from cl_graft.models.text import encode_prompts
from cl_graft.transfer.config import BuildConfig
from cl_graft.transfer.sources import SourceError, worded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sampler = Callable[[Sequence[str], int], list[list[Answer]]]  # prompts, seed -> answers of each


@dataclass(frozen=True)
class Chunk:
    """Prompts, by their number in the build, that one source answers in one batch under one seed."""

    source: str
    prompts: tuple[int, ...]
    seed: int


def chunks(
    sources: Sequence[str], prompts: Sequence[str], samples: int, seed: int, answers: int
) -> list[Chunk]:
    """The whole schedule: source by source, prompts of like length together, about `answers` in a chunk."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    size = max(1, answers // samples)
    groups = [tuple(order[i : i + size]) for i in range(0, len(order), size)]
    return [
        Chunk(source, group, _seed(seed, source, number))
        for source in sources
        for number, group in enumerate(groups)
    ]


def _seed(seed: int, source: str, number: int) -> int:
    text = f"{seed}\n{source}\n{number}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) >> 1


def hf_sampler(config: BuildConfig, source: str, max_new_tokens: int, chat: bool | None) -> Sampler:
    """Transformers: on the GPU if there is one."""
    model, tokenizer = load(source, config.data_dir)
    temperature = config.temperature or None  # 0 is greedy

    def sample(prompts: Sequence[str], seed: int) -> list[list[Answer]]:
        texts = [worded(tokenizer, source, p, chat) for p in prompts for _ in range(config.samples)]
        said = answers(model, tokenizer, texts, max_new_tokens, temperature, seed, config.top_p)
        return [said[i : i + config.samples] for i in range(0, len(said), config.samples)]

    return sample


def vllm_sampler(
    config: BuildConfig, source: str, max_new_tokens: int, chat: bool | None
) -> Sampler:
    """vLLM, where it is installed. Raises SourceError where it is not."""
    require_vllm()
    from vllm import LLM, SamplingParams

    engine = LLM(model=locate(source, config.data_dir), seed=config.seed, trust_remote_code=False)
    tokenizer = engine.get_tokenizer()

    def sample(prompts: Sequence[str], seed: int) -> list[list[Answer]]:
        texts = [worded(tokenizer, source, prompt, chat) for prompt in prompts]
        inputs, parameters = vllm_request(config, tokenizer, texts, max_new_tokens, seed)
        outputs = engine.generate(
            inputs, [SamplingParams(**each) for each in parameters], use_tqdm=False
        )
        return [[_answer(said) for said in output.outputs] for output in outputs]

    return sample


def require_vllm() -> None:
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise SourceError(
            "vLLM is not installed; run `pip install cl-graft[vllm]` on a machine with a GPU, or use --backend hf."
        )


def vllm_request(
    config: BuildConfig,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_new_tokens: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What vLLM is asked: token ids of each prompt, and its sampling parameters.

    Ids, so that both engines read the same tokens; a seed of its own for every prompt, so that no answer
    depends on what else is in the batch; and top-k off, whatever the model's generation_config.json says.
    """
    inputs = [{"prompt_token_ids": list(ids)} for ids in encode_prompts(tokenizer, texts)]
    common = {
        "n": config.samples,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": 0,
        "max_tokens": max_new_tokens,
    }
    return inputs, [{**common, "seed": (seed + i) % 2**31} for i in range(len(texts))]


def _answer(said: Any) -> Answer:
    """vLLM's CompletionOutput; the end-of-sequence token is among its ids where it stopped by itself."""
    finished = said.finish_reason == "stop"
    return Answer(said.text, len(said.token_ids) - finished, finished)


ANSWERS = {"hf": BATCH, "vllm": 16 * BATCH}  # of a chunk: vLLM batches by itself, and wants more
SAMPLERS: dict[str, Callable[[BuildConfig, str, int, bool | None], Sampler]] = {
    "hf": hf_sampler,
    "vllm": vllm_sampler,
}
