"""What tuning changed besides weights: how the model computes, how it is spoken to, and where it stops.

It goes into the pack as files (skillpack/format/files.py) where it differs in meaning, and `apply` writes it:
config.json without what belongs to a folder or follows from the tensors, the others as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cl_graft.errors import CLGraftError
from cl_graft.models.weights import read_json
from cl_graft.skillpack.format.files import (
    TALK,
    TEMPLATE,
    VOCABULARY,
    PackedFile,
    is_known,
    parse,
)

Config = Mapping[str, Any]
# keys of config.json that belong to a folder, or follow from the tensors: the base's stay, or `apply` sets them
STAYS = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config"),
    *("transformers_version", "unsloth_version", "use_cache", "vocab_size", "tie_word_embeddings"),
}
# keys that say where and by what a tokenizer_config.json and a generation_config.json were written
MADE = {"name_or_path", "tokenizer_file", "transformers_version", "unsloth_version"}
MADE |= {"_from_model_config"}
# of a tokenizer.json: those of the last call, and the version of its form
CALLS = {"version", "truncation", "padding"}
GENERATION, MOST_TOLD = "generation_config.json", 4


class OwnCode(CLGraftError):
    """A tuned model that is to be read by code of its own."""


class Carried(NamedTuple):
    """files: {name: content}, nothing in one that the result is not to have. told: what differs, in words."""

    files: dict[str, bytes]
    told: list[str]


def carried(base: Path, tuned: Path) -> Carried:
    """Find what of two model folders differs besides the weights.

    What the tuned folder does not have at all (config.json, a tokenizer, a generation_config.json) is not taken for a
    change. Raises OwnCode, CheckpointError.
    """
    files: dict[str, bytes] = {}
    told = []
    theirs = _read(tuned / "config.json")
    if theirs and (changed := changed_settings(_read(base / "config.json"), theirs)):
        files["config.json"] = json.dumps(settings(theirs), separators=(",", ":")).encode()
        more = f" and {len(changed) - MOST_TOLD} more" if len(changed) > MOST_TOLD else ""
        told.append(f"config.json ({', '.join(changed[:MOST_TOLD])}{more})")
    if any(tuned.glob("token*")):
        words, spoken = _words(base, tuned), _spoken(base, tuned)
        if words or spoken:
            templates = [
                file.relative_to(folder) for folder in (base, tuned) for file in _more(folder)
            ]
            files |= _differing(base, tuned, [*TALK, TEMPLATE, *map(str, templates)])
            files |= _differing(base, tuned, VOCABULARY) if words else {}
        told += [*(["tokenizer"] if words else []), *spoken]
    if (tuned / GENERATION).is_file() and _plain(base, GENERATION) != _plain(tuned, GENERATION):
        files |= _differing(base, tuned, [GENERATION])
        told.append("generation settings")
    for name in files.keys() & {*TALK, GENERATION}:
        _check(tuned / name, files[name])
    return Carried(files, told)


def packed_files(
    base: Path, tuned: Path, rows: int | None
) -> tuple[dict[str, PackedFile], list[str]]:
    """Pack what `carried` finds; the files, and sentences about them. rows: of the tuned model's embedding."""
    found = carried(base, tuned)
    if not found.files:
        return {}, []
    files = {name: PackedFile.of(content) for name, content in found.files.items()}
    stored = sum(len(file.stored) for file in files.values())
    notes = [
        f"The tuned model has its own {joined(found.told)}: in the pack, in {stored:,} bytes, and written by "
        "`cl-graft pack apply`."
    ]
    largest = _largest_id(found.files.get("tokenizer.json", b""))
    if rows is not None and largest >= rows:
        notes.append(
            f"The tokenizer of {tuned} has the id {largest} and the embedding {rows} rows: no text of that id can be "
            "read."
        )
    return files, notes


def settings(config: Config) -> dict[str, Any]:
    """What of a config.json travels, of the configs within it, too."""
    return {
        key: settings(value) if _is_inner(key, value) else value
        for key, value in config.items()
        if key not in STAYS
    }


def with_settings(base: Config, travelled: Config) -> dict[str, Any]:
    """The base's config.json with the settings of another; of what does not travel, the base's own."""
    stays = {key: value for key, value in base.items() if key in STAYS}
    return stays | {
        key: with_settings(base.get(key) or {}, value) if _is_inner(key, value) else value
        for key, value in travelled.items()
    }


def changed_settings(base: Config, tuned: Config) -> list[str]:
    """`key: the tuned's value instead of the base's` for all that travels of config.json and differs.

    Both are completed and spelled as transformers does, so that a default that one of them leaves out is no
    difference, nor is another version's spelling of the same.
    """
    ours, theirs = _complete(base), _complete(tuned)
    return [
        f"{key}: {theirs.get(key)} instead of {ours.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if key.rpartition(".")[2] not in STAYS and ours.get(key) != theirs.get(key)
    ]


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


def _flat(config: Config, before: str = "") -> dict[str, Any]:
    """Configs within configs, such as text_config, as keys of one: text_config.hidden_size."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if _is_inner(key, value):
            found |= _flat(value, f"{before}{key}.")
        else:
            found[before + key] = json.loads(json.dumps(value, default=str))
    return found


def _is_inner(key: str, value: object) -> bool:
    """Whether a value of a config is a config itself."""
    return key.endswith("_config") and isinstance(value, dict)


# the tokenizer's files


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _plain(folder: Path, name: str) -> dict[str, Any]:
    """What a small JSON file says, but for where it was made, and for nulls."""
    found = _read(folder / name)
    return {key: value for key, value in found.items() if key not in MADE and value is not None}


def _more(folder: Path) -> list[Path]:
    """Further chat templates that a pack may hold."""
    found = sorted(folder.glob("additional_chat_templates/*"))
    return [file for file in found if file.is_file() and is_known(str(file.relative_to(folder)))]


def _spoken(base: Path, tuned: Path) -> list[str]:
    """What differs in how the model is spoken to, with one vocabulary."""
    told = []
    if _templates(base) != _templates(tuned):
        told.append("chat template")
    if (ours := _end(base)) != (theirs := _end(tuned)):
        told.append(f"end token ({theirs} instead of {ours})")
    rest = [_plain(folder, "tokenizer_config.json") for folder in (base, tuned)]
    for found in rest:
        for key in ("chat_template", "eos_token"):
            found.pop(key, None)
    return told + (["tokenizer settings"] if rest[0] != rest[1] else [])


def _templates(folder: Path) -> list[Any]:
    """Every chat template of a folder, wherever the version that saved it puts them."""
    inside = _read(folder / "tokenizer_config.json").get("chat_template")
    inside = inside or _read(folder / "chat_template.json").get("chat_template")
    files = [folder / TEMPLATE, *_more(folder)]
    texts = [file.read_text("utf-8") for file in files if file.is_file()]
    return ([inside] if inside else []) + texts


def _end(folder: Path) -> str:
    """The token, and the ids, at which the model is said to stop."""
    token = _read(folder / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    config = _read(folder / "config.json")
    config = config.get("text_config", config) if "eos_token_id" not in config else config
    ids = _read(folder / GENERATION).get("eos_token_id", config.get("eos_token_id"))
    return f"{token!r}, id {ids}"


def _largest_id(tokenizer: bytes) -> int:
    """The largest id that a tokenizer.json knows; -1 where it is empty."""
    file = json.loads(tokenizer or b"{}")
    vocab = (file.get("model") or {}).get("vocab") or {}
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    return max([*ids, *(token["id"] for token in file.get("added_tokens", ()))], default=-1)


def _words(base: Path, tuned: Path) -> bool:
    """Whether text becomes other ids: by tokenizer.json, or else by the files that the folders have in common."""
    if all((folder / "tokenizer.json").is_file() for folder in (base, tuned)):
        return _tokenizer(base) != _tokenizer(tuned)
    both = [name for name in VOCABULARY if all((f / name).is_file() for f in (base, tuned))]
    return not both or any(
        (base / name).read_bytes() != (tuned / name).read_bytes() for name in both
    )


def _tokenizer(folder: Path) -> Any:
    """What a tokenizer.json says of text, in one spelling."""
    file = {k: v for k, v in _read(folder / "tokenizer.json").items() if k not in CALLS}
    model = file.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        file["model"] = {**model, "merges": merges}
    return file


def _differing(base: Path, tuned: Path, names: Iterable[str]) -> dict[str, bytes]:
    """{name: content in the tuned folder} where it is not that of the base; nothing in one that it lacks."""
    ours, theirs = (
        {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
        for folder in (base, tuned)
    )
    return {
        name: theirs.get(name, b"")
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    }


def _check(path: Path, content: bytes) -> None:
    """Raise OwnCode for a file that no pack may hold."""
    try:
        if content:
            parse(content)
    except ValueError as error:
        raise OwnCode(f"{path} cannot go into a pack: {error}") from None
