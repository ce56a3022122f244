"""Dense views of frozen modules, and small exact building blocks that every adapter shares.

Adapters never touch ``module.weight`` directly: a ``Linear`` keeps (out, in), transformers' ``Conv1D`` keeps (in,
out), and a bitsandbytes layer keeps packed codes. :func:`dense_weight` gives the (out, in) matrix that the module
multiplies by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from secura_lightning.errors import SecuraError

_INT8_RANGE = 127.0
# Elements of one block of rows: a CPU's cache holds it, while a GPU wants few, large kernels.
_CPU_BLOCK = 1 << 18
_GPU_BLOCK = 1 << 25


def _has_class_named(module: nn.Module, name: str) -> bool:
    # By name, so that neither transformers nor bitsandbytes has to be importable.
    return any(cls.__name__ == name for cls in type(module).__mro__)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D`` (GPT-2): a linear map that stores its weight as (in, out)."""
    return _has_class_named(module, "Conv1D") and hasattr(module, "nf")


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a bitsandbytes 4-bit or 8-bit linear layer."""
    return _has_class_named(module, "Linear4bit") or _has_class_named(module, "Linear8bitLt")


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes x W^T (+ b) with one 2-D weight: ``nn.Linear``, its quantised forms, ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``F.linear(x, module.weight, module.bias)`` is exactly what ``module`` computes."""
    return isinstance(module, nn.Linear) and not is_quantized(module)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear module, also where the stored weight is packed or transposed."""
    if is_conv1d(module):
        rows, columns = cast(Tensor, module.weight).shape
        return columns, rows
    linear = cast(nn.Linear, module)
    return linear.out_features, linear.in_features


def dense_weight(module: nn.Module) -> Tensor:
    """The matrix that ``module`` multiplies by, as (out, in); without gradient.

    A view of the stored weight where one exists, otherwise a dequantised copy.

    Raises:
        SecuraError: An 8-bit layer has no scales yet, because the model was never moved to its device.
    """
    weight = gathered(cast(Tensor, module.weight).detach())
    if is_conv1d(module):
        return weight.t()
    if _has_class_named(module, "Linear4bit"):
        return _dequantize_4bit(cast(nn.Linear, module))
    if _has_class_named(module, "Linear8bitLt"):
        return _dequantize_8bit(module)
    return weight


def gathered(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or all of it where it is spread over processes: a collective call."""
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every process has whole, spread over the processes if ``like`` is; nothing is sent."""
    if not hasattr(like, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


def _dequantize_4bit(module: nn.Linear) -> Tensor:
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:  # not yet moved to its device: bitsandbytes packs on the way there
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    dense: Tensor = dequantize_4bit(weight.detach(), state)
    return dense.reshape(module.out_features, module.in_features)


def _dequantize_8bit(module: nn.Module) -> Tensor:
    weight, state = cast(Tensor, module.weight), getattr(module, "state", None)
    # The codes and their row scales move from the parameter to the module's state at the first forward.
    for holder in (weight, state):
        codes, scales = getattr(holder, "CB", None), getattr(holder, "SCB", None)
        if codes is not None and scales is not None:
            return codes.float() * (scales.float() / _INT8_RANGE).unsqueeze(-1)
    if weight.is_floating_point():
        return weight.detach()
    raise SecuraError("an 8-bit layer has no scales yet: load the model onto its device before adapters are injected")


def stored_layout(module: nn.Module, dense: Tensor) -> Tensor:
    """Turn an (out, in) matrix into the layout in which ``module`` stores its weight; its own inverse."""
    return dense.t() if is_conv1d(module) else dense


def work_dtype(module: nn.Module) -> torch.dtype:
    """Type of an adapter's own tensors: fp32, or fp64 on an fp64 base."""
    return torch.float64 if cast(Tensor, module.weight).dtype == torch.float64 else torch.float32


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which weight-level maths keeps its own precision, whatever autocast says around it."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def add_product(base_output: Tensor, features: Tensor, left: Tensor, alpha: float = 1.0) -> Tensor:
    """``base_output + alpha * features @ left.T`` in one kernel.

    Args:
        base_output: [..., out].
        features: [..., k], of the same type.
        left: [out, k], of the same type.
        alpha: Scale of the product.
    """
    flat = torch.addmm(
        base_output.reshape(-1, base_output.shape[-1]), features.reshape(-1, left.shape[1]), left.t(), alpha=alpha
    )
    return flat.view(base_output.shape)


def row_and_column_norms(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[out] and [in] norms of the rows and columns of ``weight`` [out, in], computed in ``dtype``.

    On a CPU in one reading of the weight: ``vector_norm(dim=0)`` walks down the columns of a row-major matrix, which
    takes ten times as long as along its rows.
    """
    if weight.device.type != "cpu":
        rows, columns = (torch.linalg.vector_norm(weight, dim=dim, dtype=dtype) for dim in (1, 0))
        return rows, columns
    if not weight.is_contiguous() and weight.t().is_contiguous():  # Conv1D's
        columns, rows = row_and_column_norms(weight.t(), dtype)
        return rows, columns
    height = max(1, _CPU_BLOCK // weight.shape[1])
    rows = weight.new_empty(len(weight), dtype=dtype)
    squares = weight.new_zeros(min(height, len(weight)), weight.shape[1], dtype=dtype)  # [i] of rows i, i + height, ...
    for block, norms in zip(weight.split(height), rows.split(height), strict=True):
        wide = block.to(dtype)
        torch.linalg.vector_norm(wide, dim=1, out=norms)
        squares[: len(wide)].addcmul_(wide, wide)
    return rows, squares.sum(0).sqrt_()


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Consecutive rows of a [out, in] matrix, in blocks small enough that working copies of one hardly count."""
    height = max(1, (_CPU_BLOCK if weight.device.type == "cpu" else _GPU_BLOCK) // weight.shape[1])
    for start in range(0, weight.shape[0], height):
        yield slice(start, min(start + height, weight.shape[0]))


def row_products(left: Tensor, gram: Tensor) -> Tensor:
    """Squared norms of the rows of ``left @ right``, given ``gram = right @ right.T``, without the product itself.

    Args:
        left: [out, k].
        gram: [k, k].

    Returns:
        [out], never negative.
    """
    return ((left @ gram) * left).sum(-1).clamp_min(0)


def module_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the module's name only, not on the order of injection."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
