"""The factors of a delta through auto-gptq 0.7.1's own GPTQ class, as the released pipeline takes them.

Delta-CoMe's and GraftLLM's code quantises, for each precision in turn, the right factors S V^T by GPTQ on the layer's
inputs, and then the left ones, U, on what the quantised right ones make of these, in groups along the ranks. Scales
are kept in float16. With act-order a group's grid is fitted before the first column (`static_groups`), for a pack keeps
no order of columns.

The class is all that is taken from the package, whose `__init__` needs a transformers that is long gone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cl_graft.errors import CLGraftError
from cl_graft.skillpack.codecs import Encoded, Spec, quantized_product, quantized_product_spec
from cl_graft.skillpack.codecs.quant import Quantized, normalised
from cl_graft.skillpack.compress.factorise import Counts, Factored
from cl_graft.skillpack.compress.singular import singular

PACKAGE = "auto_gptq"
ALIAS = "cl_graft_auto_gptq"


def require(transposed: Iterable[str] = ()) -> None:
    """Raise CLGraftError where the package is not installed, or a matrix is stored as the solver cannot keep it.

    transposed: names of the matrices that are stored (in, out).
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise CLGraftError(
            "the solver auto-gptq is a package that is not there; install it with "
            "`pip install --no-deps auto-gptq==0.7.1`."
        )
    if name := next(iter(transposed), None):
        raise CLGraftError(
            f"{name} is stored (in, out), and factors by auto-gptq are kept for (out, in) alone; take the solver "
            "cl-graft."
        )


@cache
def solver() -> Any:
    """The class GPTQ. Nothing of its package stays in sys.modules, and torch is left as it was."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        require()
        raise CLGraftError(f"{PACKAGE} has no files; install auto-gptq 0.7.1 anew.")
    stub = ModuleType(ALIAS)
    stub.__path__ = [str(Path(spec.origin).parent / "quantization")]
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    sys.modules[ALIAS] = stub
    try:
        module: Any = importlib.import_module(f"{ALIAS}.gptq")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        for name in [n for n in sys.modules if n == ALIAS or n.startswith(f"{ALIAS}.")]:
            del sys.modules[name]
    if not torch.cuda.is_available():
        module.torch = _WithoutCuda()
    return module.GPTQ


class _WithoutCuda:
    """torch, to a module that waits for a GPU wherever it runs."""

    class cuda:
        synchronize = empty_cache = staticmethod(lambda *args: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def spec_of(counts: Counts, shape: tuple[int, int], group_size: int) -> Spec:
    """Codec, shape and meta that `encode` will give, to know its bytes beforehand."""
    right = min(group_size, shape[1])
    groups = [[k, bits, min(group_size, k), right] for bits, k in counts.items()]
    return quantized_product_spec(shape, groups)


def encode(
    matrices: Sequence[Factored],
    hessian: Tensor | None,
    *,
    group_size: int = 128,
    damping: float = 0.01,
    act_order: bool = False,
) -> list[Encoded]:
    """Quantise the factors of matrices that read the same inputs, of second moment `hessian` (in, in), each by itself.

    Without a second moment all inputs count alike. Spectra are those of the plain SVD.
    """
    options: dict[str, Any] = {"damping": damping, "act_order": act_order}
    found = []
    for m in matrices:
        rows, cols = m.delta.shape
        moment = torch.eye(cols, device=m.delta.device) if hessian is None else hessian
        ranks = [*m.counts.values()]
        lefts, rights = singular(m.delta, m.spectrum, sum(ranks))
        pairs = []
        for bits, left, right in zip(
            m.counts, lefts.split(ranks, 1), rights.split(ranks), strict=True
        ):
            kept = quantise(right, moment, bits, min(group_size, cols), **options)
            read = kept.dequantize()
            size = min(group_size, len(read))
            pairs.append((quantise(left, read @ moment @ read.T, bits, size, **options), kept))
        found.append(quantized_product(pairs, (rows, cols)))
    return found


def quantise(
    weight: Tensor, moment: Tensor, bits: int, group_size: int, *, damping: float, act_order: bool
) -> Quantized:
    """A matrix (rows, cols) under the second moment (cols, cols) of what it reads, in groups along the columns.

    Asymmetric min-max grids, as released.
    """
    x, exponent = normalised(weight)
    layer = nn.Linear(x.shape[1], x.shape[0], bias=False, device=x.device)
    layer.weight.data = x
    task = solver()(layer)
    task.quantizer.configure(bits, perchannel=True, sym=False, mse=False)
    task.H, task.nsamples = moment.float().clone(), 1
    scale, zero, _ = task.fasterquant(
        percdamp=damping, group_size=group_size, actorder=act_order, static_groups=act_order
    )
    group = torch.arange(x.shape[1], device=x.device) // group_size
    codes = torch.round(layer.weight.data / scale[:, group]) + zero[:, group]
    parts = codes.clamp(0, 2**bits - 1).byte(), scale.half(), zero.byte()
    return Quantized(*parts, bits, group_size, exponent)
