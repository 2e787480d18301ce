"""A GGUF file, as llama.cpp reads it, as a Hugging Face folder: dequantised once, by transformers' own reader.

What transformers passes over without a word, and would make another model of it, is refused here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_graft.errors import CLGraftError, UnknownName, first_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")
RECORD = ".gguf.json"  # hidden, so that no grafted folder takes it over: it is true of these weights alone
PIECE = 1 << 22
# tensors that stretch RoPE: transformers reads neither them nor the factors that they were made of
ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

Fingerprint = Callable[[Iterable[tuple[str, "Tensor"]]], str]  # of named weights


class GGUFError(CLGraftError):
    """A GGUF file that cannot be read, or not as the model that it is."""


@dataclass(frozen=True)
class Imported:
    """What a folder was made of. fingerprint: of the dequantised weights in `dtype`, as packs name their base.

    types: {type of the file's tensors: how many}. sha256: of the file.
    """

    file: str
    sha256: str
    architecture: str
    types: dict[str, int]
    dtype: str
    parameters: int
    fingerprint: str
    made_by: dict[str, str]


def import_gguf(
    source: Path, out: Path, fingerprint: Fingerprint, dtype: str = "float32"
) -> Imported:
    """Make the Hugging Face folder `out`, whole or not at all, of a GGUF file or of a folder that holds one.

    dtype: of the weights; they are dequantised in float32. What the folder was made of is returned and kept in its
    `.gguf.json`. Raises GGUFError, UnknownName for a dtype, and CLGraftError where `gguf` is not installed.
    """
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    file = find(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GGUFError(f"{out} exists and is not empty; name a new folder.")
    architecture, types = examine(file)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    building = Path(
        tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".tmp", dir=out.absolute().parent)
    )
    try:
        with _alone(file) as (folder, name):
            model = _model(file, folder, name, dtype)
            _tokenizer(file, folder, name).save_pretrained(building)
        model.save_pretrained(building)
        about = Imported(
            file.name,
            sha256_of(file),
            architecture,
            types,
            dtype,
            sum(p.numel() for p in model.parameters()),
            fingerprint(model.named_parameters()),
            {name: metadata.version(name) for name in ("transformers", "gguf")},
        )
        (building / RECORD).write_text(json.dumps(asdict(about), indent=1) + "\n", encoding="utf-8")
        building.chmod(0o755)  # mkdtemp's is for this user alone
        os.replace(building, out)
    except OSError as error:
        why = error.strerror or first_line(error)
        raise GGUFError(f"{out} was not written ({why}); name another folder.") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return about


def find(source: Path) -> Path:
    """The one GGUF file that is meant. Raises GGUFError."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise GGUFError(f"there is no {source}; give a GGUF file, or a folder that holds one.")
    found = sorted(source.glob("*.gguf"))
    if not found:
        raise GGUFError(f"{source} holds no file that ends in .gguf; give a GGUF file.")
    if len(found) > 1:
        raise GGUFError(
            f"{source} holds {len(found)} GGUF files, of one model in several types as a rule; give one: {found[0]}."
        )
    return found[0]


def require_reader() -> None:
    """Raises CLGraftError where the package `gguf` is not installed."""
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise CLGraftError("a GGUF is read by a package of its own; `pip install cl-graft[gguf]`.")


def examine(file: Path) -> tuple[str, dict[str, int]]:
    """A file's architecture, and {type of its tensors: how many}.

    Raises GGUFError for what is no GGUF, one of several parts, or with tensors that transformers passes over;
    CLGraftError where `gguf` is not installed.
    """
    require_reader()
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        fields = {
            name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1
        }
        architecture = str(fields["general.architecture"])
    except Exception as error:  # a torn file ends in errors of many kinds
        told = f"{type(error).__name__}: {first_line(error)}"
        raise GGUFError(f"{file} is no whole GGUF file ({told}); fetch it again.") from error
    if (parts := int(fields.get("split.count", 1))) > 1:
        raise GGUFError(
            f"{file} is one of {parts} parts of a model; join them first with `llama-gguf-split --merge` of llama.cpp."
        )
    types: dict[str, int] = {}
    for tensor in reader.tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        if tensor.name in ROPE:
            raise GGUFError(
                f"{file} scales its positions by {tensor.name!r}, which transformers passes over, so that it would be "
                "another model; give the Hugging Face folder that it was made from."
            )
    return architecture, types


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _alone(file: Path) -> Iterator[tuple[str, str]]:
    """A folder in which the file is alone, and its name there: transformers would take what lies beside it (a
    config.json, a tokenizer, an adapter) into account."""
    with tempfile.TemporaryDirectory(prefix="cl-graft-gguf-") as folder:
        name = "model.gguf"
        (Path(folder) / name).symlink_to(file.absolute())
        yield folder, name


def _model(file: Path, folder: str, name: str, dtype: str) -> PreTrainedModel:
    """The model, dequantised, with nothing left of that it was ever quantised."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # since transformers has it, blocks of some architectures stay packed where there are kernels for them
    packed = getattr(transformers, "GgufConfig", None)
    dense = {"quantization_config": packed(dequantize=True)} if packed else {}
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # a bar of a few seconds that no setting silences
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=name,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                **dense,
            )
    except Exception as error:  # each architecture has errors of its own
        told = f"{type(error).__name__}: {first_line(error)}"
        raise GGUFError(
            f"transformers cannot read {file} ({told}); give the Hugging Face folder that it was made from, or another "
            "GGUF of it."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if lacks := sorted(info["missing_keys"]):
        raise GGUFError(
            f"{file} has no weights for {len(lacks)} parameters of its architecture ({lacks[0]!r}, ...), which would "
            "be random numbers; give another GGUF of it."
        )
    _forget_quantisation(model)
    return model.to(getattr(torch, dtype)).eval()


def _forget_quantisation(model: Any) -> None:
    """save_pretrained refuses a dequantised model as if it were quantised still, and config.json would say so; the
    place that it was loaded from is a temporary folder."""
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if name in vars(holder):
            delattr(holder, name)
    for name in ("is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("_model_name_or_path", None)  # the GGUF's title, which is no path
    model.config.name_or_path = model.name_or_path = ""


def _tokenizer(file: Path, folder: str, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer has errors of its own
        told = f"{type(error).__name__}: {first_line(error)}"
        raise GGUFError(
            f"the tokenizer of {file} cannot be read ({told}); give another GGUF of it."
        ) from error
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs.pop("name_or_path", None)
    tokenizer.init_kwargs.pop("gguf_file", None)
    return tokenizer
