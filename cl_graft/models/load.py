"""Loading a model by the embedded model's name, a local folder, or a hub id. Remote code is never run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.models import embedded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# what a model's folder is read for
FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.bin")


def locate(name: str, data_dir: Path | None = None) -> str:
    """The folder or hub id behind a model's name; an embedded model is trained now if need be. Raises as `check`."""
    check(name)
    return str(embedded.obtain(name, data_dir)) if name in embedded.SPECS else name


def check(name: str) -> None:
    """Raises UnknownName for a name that is neither embedded, nor a folder, nor shaped like `owner/model`.

    Raises CLGraftError for a folder that is no model's.
    """
    if name in embedded.SPECS:
        return
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise CLGraftError(f"{name} holds no config.json; give a Hugging Face model folder.")
    elif name.count("/") != 1 or name.startswith((".", "/")):
        raise UnknownName("model", name, [*embedded.SPECS, "a model folder", "owner/model"])


def without_weights(name: str, data_dir: Path | None = None) -> PreTrainedModel | None:
    """The model with its parameters on the meta device; None for one of the hub whose configuration is not here yet.

    Nothing is trained or fetched. Raises as `check`, and CLGraftError for a configuration that is none.
    """
    from transformers import AutoConfig

    from cl_graft.models.meta_model import meta_model

    check(name)
    if name in embedded.SPECS:
        return embedded.without_weights(name, data_dir)
    if Path(name).is_dir():
        return meta_model(name).model
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=True)
    except Exception:  # of many kinds; `load` says what is wrong once it has asked the hub
        return None
    return meta_model(config).model


def attention() -> str:
    """The fastest attention that this machine has: flash attention where its kernels are installed, else SDPA."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    return (
        "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"
    )


def load(
    name: str, data_dir: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32 on the CPU, bfloat16 on a GPU) and tokenizer with a padding token.

    Raises as `locate` and `load_tokenizer` do, and CLGraftError for weights that cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = locate(name, data_dir)
    tokenizer = load_tokenizer(name, place)
    on_gpu = torch.cuda.is_available()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            place,
            trust_remote_code=False,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            attn_implementation=attention(),
        )
    except Exception as error:  # torn weights, no network, ...: each library has errors of its own
        raise _unloadable(f"model {name!r}", error) from error
    return model.to("cuda" if on_gpu else "cpu"), tokenizer


def load_tokenizer(name: str, place: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model `name`, located at `place`; it has a padding token.

    Raises CLGraftError where it cannot be loaded or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:
        raise _unloadable(f"the tokenizer of model {name!r}", error) from error
    if tokenizer.eos_token_id is None:
        raise CLGraftError(
            f"the tokenizer of {name!r} has no end-of-sequence token; set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def _unloadable(what: str, error: Exception) -> CLGraftError:
    reason = str(error).strip().split("\n", 1)[0].rstrip(".")
    return CLGraftError(
        f"{what} cannot be loaded ({type(error).__name__}: {reason}); give an embedded model's name, a complete "
        "Hugging Face folder, or a hub id."
    )
