"""Loading a model by an embedded or fetched one's name, a local folder, or a hub id. Remote code is never run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_graft.errors import CLGraftError, UnknownName, errors_alone, first_line
from cl_graft.models import embedded, published
from cl_graft.models.weights import CheckpointError, check_folder, weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cl_graft.models.dispatch import DeviceMap

# what a model's folder is read for
FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.bin")
WEIGHTS = FILES[3:]
WIDEST = 4  # bytes that a stored byte may take in memory: float32 of eight bits


def locate(
    name: str,
    data_dir: Path | None = None,
    progress: embedded.Trained = lambda step, loss: None,
) -> str:
    """The folder or hub id behind a model's name; an embedded model is trained now if need be. Raises as `check`."""
    check(name)
    if name in embedded.SPECS:
        return str(embedded.obtain(name, data_dir, progress))
    return str(folder_of(name) or name)


def folder_of(name: str) -> Path | None:
    """The folder of a model that is not embedded; None for a hub id. Raises NotFetched for one that is yet to be."""
    if name in published.PUBLISHED:
        return published.located(name)
    return Path(name) if Path(name).is_dir() else None


def check(name: str) -> None:
    """Raises UnknownName for a name that is neither of a model here, nor a folder, nor shaped like `owner/model`.

    Raises CLGraftError for a folder that is not there, NotFetched for a published model, CheckpointError for a folder
    that is no model's, is not whole, or can be read in two ways. Nothing is asked of the hub.
    """
    if name in embedded.SPECS:
        return
    if folder := folder_of(name):
        check_folder(folder)
    elif "/" not in name:
        known = [*embedded.SPECS, *published.PUBLISHED]
        raise UnknownName("model", name, known, "a model's folder or hub id")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CLGraftError(
            f"there is no folder {name}; give a Hugging Face model folder, a hub id, or an embedded model's name."
        )


@cache
def reach(name: str) -> None:
    """Raises CLGraftError for a hub id of which neither this machine nor the hub has a model that may be read.

    A model whose configuration is in the cache is not asked for; the weights are loaded later.
    """
    check(name)
    if name in embedded.SPECS or folder_of(name):
        return
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    lacks = f"model {name!r} is no folder here and not in this machine's cache"
    if constants.HF_HUB_OFFLINE:
        raise CLGraftError(
            f"{lacks}, and HF_HUB_OFFLINE forbids asking the hub; give a folder, or unset it."
        )
    try:
        HfApi().auth_check(name)
    except errors.GatedRepoError as error:
        raise CLGraftError(
            f"model {name!r} is gated; ask for access on its page, then log in by `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CLGraftError(
            f"{lacks}, and the hub shows none of that name; check the spelling, or log in by `hf auth login` where it "
            "is private."
        ) from error
    # no network, a name that is none, ...: each client has errors of its own
    except Exception as error:
        told = first_line(error)
        raise CLGraftError(
            f"{lacks}, and the hub cannot be asked ({type(error).__name__}: {told}); give a folder, or try again "
            "with a network."
        ) from error


def without_weights(name: str, data_dir: Path | None = None) -> PreTrainedModel | None:
    """The model with its parameters on the meta device; None for one of the hub whose configuration is not here yet.

    Nothing is trained or fetched. Raises as `check`, and CLGraftError for a configuration that is none.
    """
    from transformers import AutoConfig

    from cl_graft.models.meta_model import meta_model

    check(name)
    if name in embedded.SPECS:
        return embedded.without_weights(name, data_dir)
    if folder := folder_of(name):
        return meta_model(folder).model
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=True)
    except Exception:  # of many kinds; `load` says what is wrong once it has asked the hub
        return None
    return meta_model(config).model


def attention(place: str | Path) -> str | None:
    """Flash attention where its kernels are installed and the code of the model at `place` has it.

    None is what transformers takes by itself: SDPA, or plain attention where a model's code has no SDPA (Gemma 2,
    gpt-oss), or no attention at all (Mamba).
    """
    import torch
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CLASSES
    from transformers.utils import is_flash_attn_2_available

    if not (torch.cuda.is_available() and is_flash_attn_2_available()):
        return None
    kind = CLASSES[type(AutoConfig.from_pretrained(place, trust_remote_code=False))]
    return "flash_attention_2" if kind._supports_flash_attn else None


def load(
    name: str,
    data_dir: Path | None = None,
    memory: Mapping[str, str] | None = None,
    scratch: Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32 on the CPU, bfloat16 where there is a GPU) and tokenizer with a padding token.

    A model that does not fit one device is spread over all, host memory and the disk (models/spread.py). memory: what
    its weights may take of each, as `dispatch.device_map`. scratch: folder for what no file holds as it is loaded.
    Raises as `locate`, `load_tokenizer` and `dispatch.device_map` do, and CLGraftError for weights that cannot be
    loaded, that are not all there or are of another model than the config's, or that are no numbers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from cl_graft.models.dispatch import LOG, Spill, require_devices, settle

    logging.disable_progress_bar()
    require_devices(memory or {})
    place = locate(name, data_dir)
    tokenizer = load_tokenizer(name, place)
    if not Path(place).is_dir():
        try:
            AutoConfig.from_pretrained(place, trust_remote_code=False)  # fetched, to be looked at
        except Exception as error:
            raise _unloadable(f"model {name!r}", error) from error
    spread, spill = device_map(name, data_dir, memory), None
    if spread and "disk" in spread.values():
        spill = Spill(scratch or embedded.cache_root())
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_error()  # what it says of weights that are missing is said below, in one sentence
        with errors_alone(LOG):
            model, info = AutoModelForCausalLM.from_pretrained(
                place,
                trust_remote_code=False,
                dtype=dtype_on(torch.cuda.is_available()),
                attn_implementation=attention(place),
                key_mapping=_renamed(Path(place)),
                output_loading_info=True,
                device_map=spread,
                offload_folder=str(spill.path) if spill else None,
            )
    except Exception as error:  # torn weights, no network, ...: each library has errors of its own
        raise _unloadable(f"model {name!r}", error) from error
    finally:
        logging.set_verbosity(verbosity)
    settle(model, spill)
    _check_loaded(name, model, info)
    return model if spread else model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def device_map(
    name: str, data_dir: Path | None = None, memory: Mapping[str, str] | None = None
) -> DeviceMap | None:
    """Where the parts of a model go, told before there are any weights; see `dispatch.device_map`.

    None where it fits one device, and for a model of the hub whose configuration is not here yet. Raises as
    `without_weights`.
    """
    import torch

    from cl_graft.models import dispatch

    if memory is None:
        folder = None if name in embedded.SPECS else folder_of(name)
        files = [file for kind in WEIGHTS for file in folder.glob(kind)] if folder else []
        size = WIDEST * sum(file.stat().st_size for file in files)
        if name in embedded.SPECS or (size and dispatch.fits(size)):
            return None
    model = without_weights(name, data_dir)
    on_gpu = torch.cuda.is_available() or any(device != "cpu" for device in memory or {})
    return dispatch.device_map(model, dtype_on(on_gpu), memory) if model is not None else None


def dtype_on(gpu: bool) -> torch.dtype:
    """What weights are loaded in."""
    import torch

    return torch.bfloat16 if gpu else torch.float32


def load_tokenizer(name: str, place: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model `name`, located at `place`; it has a padding token.

    Raises CLGraftError where it cannot be loaded or has no end-of-sequence token.
    """
    from cl_graft.models.tokenizer import read

    try:
        tokenizer = read(place)
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


def _renamed(folder: Path) -> dict[str, str] | None:
    """{pattern: replacement} for names that training has changed; None for a hub id, and for pickled weights."""
    if not any(folder.glob("model*.safetensors")):
        return None
    return dict.fromkeys(weights(folder).added.values(), "") or None


def _check_loaded(name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise CheckpointError where transformers made weights up, left some of the layers out, or read no numbers."""
    import torch

    from cl_graft.models.spread import named_weights

    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"model {name!r} has no weights for {len(missing)} of its parameters ({missing[0]!r}, ...), which would be "
            "random numbers; give a folder that is whole, with the config.json that belongs to its weights."
        )
    known = {re.sub(r"\d+", "#", key) for key in model.state_dict()}
    if over := [k for k in sorted(info["unexpected_keys"]) if re.sub(r"\d+", "#", k) in known]:
        raise CheckpointError(
            f"model {name!r} has weights of more layers than its config.json counts ({over[0]!r}, ...), which would "
            "be left out; give it the config.json that belongs to its weights."
        )
    for key, weight in named_weights(model):
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{key!r} of model {name!r} holds NaN or Inf; give a checkpoint from before its training diverged."
            )


def _unloadable(what: str, error: Exception) -> CLGraftError:
    reason = first_line(error)
    return CLGraftError(
        f"{what} cannot be loaded ({type(error).__name__}: {reason}); give an embedded model's name, a complete "
        "Hugging Face folder, or a hub id."
    )
