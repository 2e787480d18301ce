"""The embedded models: small models pre-trained from a fixed seed, on text made here or on the user's data.

Nothing is downloaded. `mini-llama` comes with the package, the same weights on every machine, for sums come out
otherwise on another processor. The first use of another trains it, in a minute or some, and caches it as an ordinary
Hugging Face folder under `$CL_GRAFT_CACHE` (default `~/.cache/cl_graft`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from cl_graft.errors import CLGraftError
from cl_graft.models import corpus, mini_gpt2, mini_sources, toy_language
from cl_graft.models.recipe import ModelRecipe
from cl_graft.models.vocabulary import SPECIAL, wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pairs = Iterator[list[tuple[str, str]]]  # batches of (prompt, completion)
Trained = Callable[[int, float], None]  # told the steps that are done and the last one's loss
NewModel = Callable[
    [ModelRecipe, int], "PreTrainedModel"
]  # of a recipe and a size of the vocabulary


# folders of models that were trained once, by what is below, and are not trained again
SHIPPED = Path(__file__).with_name("shipped")
SPECS = {
    "mini-llama": ModelRecipe(
        "0.6 M parameters, shallow skill in every mini task", 128, 3, 4, 384, 900, 3e-3
    ),
    "text-llama": ModelRecipe(
        "0.9 M parameters, pre-trained on the training texts in --data-dir",
        128,
        3,
        4,
        384,
        900,
        3e-3,
        batch=16,
        corpus="data",
    ),
    "nano-llama": ModelRecipe("60 k parameters, for tests in seconds", 48, 2, 2, 96, 60, 5e-3),
    "mini-gpt2": ModelRecipe(
        "0.9 M parameters, good at every mini task: a source to transfer from",
        128,
        4,
        4,
        512,
        1500,
        3e-3,
        family="gpt2",
    ),
    "mini-neox": ModelRecipe(
        "0.9 M parameters, good at math: a source to transfer from",
        128,
        4,
        4,
        512,
        1000,
        3e-3,
        family="gpt-neox",
    ),
    "mini-opt": ModelRecipe(
        "0.7 M parameters, good at code: a source to transfer from",
        128,
        3,
        4,
        512,
        500,
        3e-3,
        family="opt",
    ),
    "mini-qwen2": ModelRecipe(
        "0.9 M parameters, good at the cipher: a source to transfer from",
        128,
        4,
        4,
        384,
        600,
        3e-3,
        family="qwen2",
    ),
    "nano-gpt2": ModelRecipe(
        "a source of the same kind, for tests in seconds", 48, 2, 2, 96, 60, 5e-3, family="gpt2"
    ),
}


def cache_root() -> Path:
    return Path(os.environ.get("CL_GRAFT_CACHE") or Path.home() / ".cache" / "cl_graft")


def folder(name: str, texts: list[str]) -> Path:
    """Where the model lives once made; the name carries all that determines its weights."""
    import torch

    digest = hashlib.blake2b(digest_size=6)
    recipe = {**asdict(SPECS[name]), "torch": torch.__version__, "machine": platform.machine()}
    if recipe["family"] == "llama":
        del recipe["family"]  # folders are older than families
    digest.update(json.dumps(recipe, sort_keys=True).encode())
    digest.update(Path(toy_language.__file__).read_bytes() if not texts else b"")
    for text in texts:
        digest.update(text.encode())
    return cache_root() / "models" / f"{name}-{digest.hexdigest()}"


def obtain(
    name: str, data_dir: Path | None = None, progress: Trained = lambda step, loss: None
) -> Path:
    """The model's folder, trained now if it is neither shipped nor there yet; safe when several processes ask at once.

    Raises DataError where a model that is trained on the user's data finds none, CLGraftError where the
    cache cannot be written.
    """
    from cl_graft.store.locks import file_lock

    if (shipped := SHIPPED / name).is_dir():
        return shipped
    spec = SPECS[name]
    texts = corpus.texts(data_dir) if spec.corpus == "data" else []
    target = folder(name, texts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(Path(f"{target}.lock")):
            if not target.exists():
                for left in target.parent.glob(
                    f".building-{target.name}-*"
                ):  # by one that was killed
                    shutil.rmtree(left, ignore_errors=True)
                build = Path(
                    tempfile.mkdtemp(prefix=f".building-{target.name}-", dir=target.parent)
                )
                try:
                    _train(spec, texts, build, progress)
                    os.replace(build, target)
                finally:
                    shutil.rmtree(build, ignore_errors=True)
    except OSError as error:
        raise CLGraftError(
            f"{name} cannot be cached in {target.parent} ({error.strerror or error}); free space there or set "
            "CL_GRAFT_CACHE to another folder."
        ) from error
    return target


def without_weights(name: str, data_dir: Path | None = None) -> PreTrainedModel:
    """The model as `obtain` makes it, its parameters on the meta device: nothing is trained. Raises as `obtain`."""
    from cl_graft.models.meta_model import meta_parameters

    spec = SPECS[name]
    texts = corpus.texts(data_dir) if spec.corpus == "data" else []
    tokenizer, new = _kind(spec, texts)
    with meta_parameters():
        return new(spec, len(tokenizer))


def _kind(spec: ModelRecipe, texts: list[str]) -> tuple[PreTrainedTokenizerBase, NewModel]:
    """The tokenizer of an embedded model, and what makes it with random weights."""
    if spec.family == "gpt2":
        return mini_gpt2.tokenizer(), mini_gpt2.new_gpt2
    if family := mini_sources.FAMILIES.get(spec.family):
        return family.tokenizer(), family.new
    return corpus.tokenizer(texts) if texts else toy_tokenizer(), new_llama


def _train(spec: ModelRecipe, texts: list[str], target: Path, progress: Trained) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the weights must not depend on how many threads there happen to be
    torch.manual_seed(spec.seed)
    try:
        tokenizer, new = _kind(spec, texts)
        batches = batches_of(spec, texts)
        model = new(spec, len(tokenizer))
        pretrain(model, tokenizer, batches, spec.steps, spec.lr, progress)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def batches_of(spec: ModelRecipe, texts: list[str]) -> Pairs:
    """The endless batches that an embedded model is pre-trained on.

    texts: of the user's data, for a model that is trained on them.
    """
    if spec.family == "gpt2":
        return mini_gpt2.batches(spec.batch, spec.seed)
    if family := mini_sources.FAMILIES.get(spec.family):
        return family.batches(spec.batch, spec.seed)
    return corpus.batches(texts, spec.batch, spec.seed) if texts else toy_batches(spec)


def toy_batches(spec: ModelRecipe) -> Pairs:
    rng = Random(spec.seed)
    while True:
        items = [toy_language.pretraining(rng) for _ in range(spec.batch)]
        yield [(toy_language.prompt(item.question), item.answer) for item in items]


def new_llama(spec: ModelRecipe, vocab: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.ffn,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=max(1, spec.heads // 2),
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Pairs,
    steps: int,
    lr: float,
    progress: Trained = lambda step, loss: None,
) -> float:
    """AdamW, 50 warm-up steps, cosine to zero, loss on the completions; returns the last loss."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 50) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    model.train()
    for step in range(steps):
        ids, mask, labels = _collate(tokenizer, next(batches))
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        progress(step + 1, loss.item())
    return loss.item()


def _collate(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]):
    import torch

    rows, starts = [], []
    for prompt, completion in pairs:
        head = tokenizer(prompt)["input_ids"]
        tail = tokenizer(completion, add_special_tokens=False)["input_ids"]
        rows.append(torch.tensor(head + tail + [tokenizer.eos_token_id]))
        starts.append(len(head))
    ids = torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=tokenizer.pad_token_id
    )
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    for row, start in zip(labels, starts, strict=True):
        row[:start] = -100
    return ids, mask, labels


def toy_tokenizer() -> PreTrainedTokenizerBase:
    """Words of the world with and without a leading blank, and every printable character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = sorted(toy_language.vocabulary(), key=lambda w: (-len(w), w))
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    tokens = [*SPECIAL, "<unk>", *characters]
    tokens += sorted(words) + [f" {w}" for w in sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    pattern = rf"(?<![A-Za-z]) ?(?:{'|'.join(words)})(?![A-Za-z])|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return wrapped(tokenizer, unk_token="<unk>")
