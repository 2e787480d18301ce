"""Source models before any of them speaks: which they are, and whether they can read the prompts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_graft.errors import CLGraftError, first_line
from cl_graft.models.chat import is_chat, user_turn
from cl_graft.models.load import FILES, locate

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class SourceError(CLGraftError):
    """A source or reward model that cannot do what the build asks of it."""


def identify(name: str, data_dir: Path | None) -> dict[str, str]:
    """What tells a model from another of its name: its commit on the hub, or a digest of its folder's files.

    Raises UnknownName or CLGraftError for a model that is not there.
    """
    place = locate(name, data_dir)
    if not Path(place).is_dir():
        commit = getattr(_config(name, place), "_commit_hash", None)
        return {"name": name, "commit": str(commit)}
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted({file for kind in FILES for file in Path(place).glob(kind)}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return {"name": name, "digest": digest.hexdigest()}


def reader(name: str, data_dir: Path | None) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """A model's config and tokenizer, without its weights. Raises SourceError where they cannot be loaded."""
    from cl_graft.models.tokenizer import read

    place = locate(name, data_dir)
    config = _config(name, place)
    try:
        return config, read(place)
    except Exception as error:
        raise _unloadable(name, "tokenizer", error) from error


def _config(name: str, place: str) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # no network, remote code wanted, no such model: libraries differ
        raise _unloadable(name, "config", error) from error


def _unloadable(name: str, what: str, error: Exception) -> SourceError:
    reason = first_line(error)
    return SourceError(
        f"the {what} of {name!r} cannot be loaded ({type(error).__name__}: {reason}); give a complete Hugging "
        "Face folder or a hub id, of a model that needs no remote code."
    )


def worded(tokenizer: PreTrainedTokenizerBase, name: str, prompt: str, chat: bool | None) -> str:
    """The prompt as the source reads it: as it is, or as a user's turn in its own chat template, where `is_chat`."""
    if not is_chat(tokenizer, chat):
        return prompt
    if tokenizer.chat_template is None:
        raise SourceError(
            f"{name} has no chat template; leave out --chat, or give a source that was trained to chat."
        )
    # not `render`, which refuses a template that begins without the token that the tokenizer adds
    return user_turn(tokenizer, prompt)[1]


def check_readable(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    chat: bool | None = False,
) -> None:
    """Raises SourceError naming the first prompt, and the characters, that the vocabulary cannot write, or
    the first prompt that leaves no room for an answer."""
    room = getattr(config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts, 1):
        lost = _lost(tokenizer, prompt)
        if lost:
            shown = ", ".join(map(repr, lost[:5]))
            raise SourceError(
                f"{name} cannot read prompt {number} ({prompt[:60]!r}): its vocabulary has no {shown}; leave such "
                "prompts out or choose another source."
            )
        length = len(tokenizer(worded(tokenizer, name, prompt, chat))["input_ids"])
        if room is not None and length + max_new_tokens > room:
            raise SourceError(
                f"{name} reads {room} tokens and prompt {number} ({prompt[:60]!r}) has {length}, which leaves no "
                f"room for {max_new_tokens} new ones; shorten the prompt or lower --max-new-tokens."
            )


def _lost(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Characters of the text that do not survive the vocabulary, in order of appearance; blanks may move."""
    ids = tokenizer(text)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=True)
    if "".join(back.split()) == "".join(text.split()) and tokenizer.unk_token_id not in ids:
        return []
    missing = Counter(text) - Counter(back)
    lost = [c for c in dict.fromkeys(text) if missing[c] and not c.isspace()]
    return lost or [text[:20]]
