"""What tuning changed besides weights: how the model computes, how it is spoken to, and where it stops.

A pack holds weights. What else makes the tuned model what it is must be known to whoever applies it: what decides
what the weights compute is refused, what decides how they are used is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_graft.models.weights import CheckpointError, read_json

Config = Mapping[str, Any]
# known to a configuration's class, and without effect on what the weights compute from tokens
HARMLESS = re.compile(
    r"dropout|pdrop|initializer|init_std|aux_loss|z_loss|jitter|router_logits|summary_|use_cache|pretraining_tp"
    r"|max_position_embeddings|n_positions|use_sliding_window|max_window_layers|vocab_size|tie_word_embeddings"
    r"|_token_id$|_token_index$"
)
SILENT = {  # differ for no reason, or follow from the tensors, or are told as what the tokenizer has
    *(
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unsloth_version"),
    *("vocab_size", "tie_word_embeddings"),
}
# what --tokenizer takes over
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template.*", "additional_chat_templates/*"),
    "generation_config.json",
)


def computing(base: Config, tuned: Config) -> dict[str, tuple[Any, Any]]:
    """{key: its value in either config}, of the keys that decide what the weights compute and that differ.

    Both are completed and spelled as transformers does, so that a default that one of them leaves out is no
    difference, nor is another version's spelling of the same.
    """
    known = _known(base)
    ours, theirs = _complete(base), _complete(tuned)
    keys = [k for k in known if not HARMLESS.search(k) and ours.get(k) != theirs.get(k)]
    return {key: (ours.get(key), theirs.get(key)) for key in keys}


def told_changes(base: Config, tuned: Config) -> list[str]:
    """Sentences on the other keys of config.json that differ, but for those that do so for no reason."""
    ours, theirs, known = _complete(base), _complete(tuned), _known(base)
    changes = []
    for key in sorted(ours.keys() | theirs.keys()):
        counts = key.rpartition(".")[2] not in SILENT and (key not in known or HARMLESS.search(key))
        if counts and ours.get(key) != theirs.get(key):
            values = f"{ours.get(key)} in the base, {theirs.get(key)} in the tuned"
            changes.append(f"config.json: {key} is {values}; the base's stays.")
    return changes


def not_in_weights(base: Path, tuned: Path) -> dict[str, str]:
    """{"chat template", "end token", ...: what differs, in words}; nothing for a folder without a tokenizer."""
    if not any(tuned.glob("token*")):
        return {}
    found = {}
    if _template(base) != _template(tuned):
        found["chat template"] = ""
    if (ours := _end(base)) != (theirs := _end(tuned)):
        found["end token"] = f" ({theirs} instead of {ours})"
    if _vocabulary(base) != _vocabulary(tuned):
        found["tokenizer"] = ""
    if _generation(base) != _generation(tuned):
        found["generation settings"] = ""
    return found


def largest_id(folder: Path) -> int:
    """The largest id that a tokenizer writes; -1 where it has no tokenizer.json. Raises CheckpointError without any."""
    if not any(folder.glob("token*")):
        raise CheckpointError(f"{folder} holds no tokenizer; give the folder of the tuned model.")
    file = _read(folder / "tokenizer.json")
    vocab = (file.get("model") or {}).get("vocab") or {}
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    return max([*ids, *(token["id"] for token in file.get("added_tokens", ()))], default=-1)


def joined(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


# config.json


def _complete(config: Config) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    try:
        whole = CONFIG_MAPPING[kind].from_dict(dict(config)).to_dict()
    except Exception:  # not one of transformers', or refused there in one of many ways
        whole = dict(config)
    return _flat(whole)


def _known(config: Config) -> list[str]:
    """The keys that a model's own configuration class has, and others have not."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    try:
        own = _flat(CONFIG_MAPPING[kind]().to_dict())
    except Exception:
        own = _flat(dict(config))
    general = PreTrainedConfig().to_dict().keys()
    return sorted(key for key in own if key.rpartition(".")[2] not in general)


def _flat(config: Config, before: str = "") -> dict[str, Any]:
    """Configs within configs, such as text_config, as keys of one: text_config.hidden_size."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            found |= _flat(value, f"{before}{key}.")
        else:
            found[before + key] = json.loads(json.dumps(value, default=str))
    return found


# the tokenizer's files


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _template(folder: Path) -> list[Any]:
    """Every chat template of a folder, wherever the version that saved it puts them."""
    inside = _read(folder / "tokenizer_config.json").get("chat_template")
    inside = inside or _read(folder / "chat_template.json").get("chat_template")
    files = [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*"))]
    texts = [file.read_text("utf-8") for file in files if file.is_file()]
    return ([inside] if inside else []) + texts


def _end(folder: Path) -> str:
    """The token, and the ids, at which the model is said to stop."""
    token = _read(folder / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    config = _read(folder / "config.json")
    config = config.get("text_config", config) if "eos_token_id" not in config else config
    ids = _read(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    return f"{token!r}, id {ids}"


def _vocabulary(folder: Path) -> Any:
    """What the ids mean; None without a tokenizer.json, of which nothing is said."""
    file = _read(folder / "tokenizer.json")
    model = file.get("model") or {}
    return (model.get("vocab"), model.get("merges"), file.get("added_tokens")) if file else None


def _generation(folder: Path) -> dict[str, Any]:
    unsaid = {"transformers_version", "_from_model_config"}
    unsaid |= {"eos_token_id", "bos_token_id", "pad_token_id"}
    found = _read(folder / "generation_config.json")
    return {key: value for key, value in found.items() if key not in unsaid and value is not None}
