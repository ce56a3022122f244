"""How much memory a run takes, from the model's config alone: nothing is loaded, nothing is computed.

One forward pass of a model of fake tensors (:mod:`secura_lightning.modeling.fake`) tells what autograd keeps.

    device = base weights + adapters + gradients + optimizer + what backward needs + logits

Not counted: the kernels' work space, what the allocator loses to fragments, and the CUDA context (about 0.5 GB); nor
what calibration takes before training and between tasks: the second moments of one block's inputs at a time.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from secura_lightning.adapters import AdapterConfig, AdapterLayer, LoRANullSequenceConfig
from secura_lightning.adapters.null_sequence import packed_size
from secura_lightning.adapters.numerics import is_linear, linear_shape
from secura_lightning.modeling.fake import fake_adapters, fake_model, own_tensors, real_tensors
from secura_lightning.modeling.load import BaseSpec, blocks_of
from secura_lightning.modeling.loss import CHUNK_LOGITS

_STATE_ROWS = (128, 256)  # of 128 weights each, of the parameters that an optimizer's state is measured on


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, and numbers of weights in the whole model.

    Attributes:
        parameters: Weights of the base.
        trainable: Trained weights.
        weights: Bytes of the base, or of this device's share and the largest gathered part of it.
        adapters: Bytes of trained weights and of what adapters keep beside them.
        gradients: Bytes of the trained weights' gradients.
        optimizer: Bytes of the optimizer's state.
        buffers: Bytes of the base's buffers.
        activations: Bytes that backward needs, the logits aside.
        logits: Bytes at the peak of the loss.
        moments: Bytes of second moments that LoRA-Null over a sequence keeps: in the CPU's memory, so not in the total,
            and in every checkpoint.
    """

    parameters: int
    trainable: int
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int
    moments: int = 0

    @property
    def total(self) -> int:
        """Bytes on one device."""
        parts = ("weights", "adapters", "gradients", "optimizer", "buffers", "activations", "logits")
        return sum(getattr(self, part) for part in parts)


@dataclass(frozen=True)
class Shape:
    """What a run does with the model.

    Attributes:
        rows: Rows of a micro-batch.
        length: Tokens of a row.
        autocast: Type of products under mixed precision, or None.
        checkpointing: Whether blocks are computed again in backward.
        chunked: Whether the logits are never held whole.
        shards: Devices that the base is spread over, and whole trained weights with it; 1 where each has all of it.
    """

    rows: int
    length: int
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    chunked: bool = False
    shards: int = 1


def estimate(
    spec: BaseSpec,
    config: AdapterConfig,
    shape: Shape,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> Memory:
    """Estimate one device's memory at the peak of a training step.

    Args:
        spec: The base.
        config: The adapter.
        shape: Rows, lengths and what saves memory.
        optimizer: Makes the optimizer.

    Raises:
        ConfigError: The adapter does not fit the model.
        SecuraError: The model's configuration cannot be read.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(spec)
        parameters = sum(p.numel() for p in model.parameters())
        weights = _gathered(model, _weight_bytes(model, spec), shape.shards)
        buffers = _bytes(model.buffers())
        layers = fake_adapters(model, config)
        own = [p for layer in layers.values() for p in own_tensors(layer.parameters(), layer.base)]
        trained = {id(p): _bytes([p]) for p in own}
        shards = shape.shards if config.whole_weights else 1
        adapters = _gathered(model, trained, shards)
        gradients = _gathered(model, trained, shards, blocks=1)
        kept = _bytes(b for layer in layers.values() for b in own_tensors(layer.buffers(), layer.base))
        activations, width = _activations(model, shape)
        moments = _moment_bytes(model, layers, config) if isinstance(config, LoRANullSequenceConfig) else 0
    state = optimizer_bytes(optimizer)
    each = {id(p): p for p in own}.values()
    return Memory(
        parameters=parameters,
        trainable=sum(p.numel() for p in each),
        weights=weights,
        adapters=adapters + kept,
        gradients=gradients,
        optimizer=round(sum(state(p) for p in each) / shards),
        buffers=buffers,
        activations=activations,
        logits=_logit_bytes(model, shape, width),
        moments=moments,
    )


def _moment_bytes(model: PreTrainedModel, layers: dict[str, AdapterLayer], config: LoRANullSequenceConfig) -> int:
    """Bytes of one packed Gram matrix for every tensor that some of the layers read."""
    inputs: dict[int, Tensor] = {}  # by id: held, so that none takes another's

    def read(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[id(args[0])] = args[0]

    hooks = [layer.register_forward_pre_hook(read) for layer in layers.values()]
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64), logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return config.moment_type.itemsize * sum(packed_size(x.shape[-1]) for x in inputs.values())


def optimizer_bytes(
    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> Callable[[Tensor], float]:
    """Bytes of an optimizer's state for a parameter, from its state on two small ones: ``state(parameter)``."""
    few, many = (_state_bytes(make, rows) for rows in _STATE_ROWS)
    per_weight = (many - few) / (128 * (_STATE_ROWS[1] - _STATE_ROWS[0]))
    fixed = few - per_weight * 128 * _STATE_ROWS[0]  # a step count, a quantisation map
    return lambda parameter: fixed + per_weight * parameter.numel() * parameter.dtype.itemsize / 4


def _state_bytes(make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], rows: int) -> int:
    with real_tensors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = nn.Parameter(torch.zeros(rows, 128))
        small.grad = torch.zeros_like(small)
        optimizer = make([small])
        optimizer.step()
    return _bytes(value for value in optimizer.state[small].values() if isinstance(value, Tensor))


# ------------------------------------------------------------------- activations


def _activations(model: PreTrainedModel, shape: Shape) -> tuple[int, int]:
    """Bytes that backward needs but for the logits, and bytes of a number of the hidden states."""
    weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    by_block: dict[str, dict[int, int]] = defaultdict(dict)
    inputs: dict[str, int] = {}
    where = [""]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            by_block[where[0]][storage._cdata] = storage.nbytes()
        return tensor

    blocks = blocks_of(model)
    twins: dict[str, str] = {}  # a block like an earlier one keeps what that one keeps
    seen: dict[Any, str] = {}
    for i, (name, block) in enumerate(blocks.items()):  # gradients begin somewhere in the first one
        twins[name] = seen.setdefault((i == 0, _signature(block)), name)
    undo = [_watch(block, name, twins[name] == name, where, inputs) for name, block in blocks.items()]
    context = torch.autocast("cpu", shape.autocast) if shape.autocast is not None else nullcontext()
    last: list[Tensor] = []
    head = cast(nn.Module, model.get_output_embeddings())
    head_hook = head.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    try:
        ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
        with context, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(input_ids=ids, logits_to_keep=1)  # noqa: F841  (its graph holds what is counted)
    finally:
        head_hook.remove()
        for restore in undo:
            restore()
    outside = sum(by_block.pop("", {}).values())
    sizes = {name: sum(by_block[first].values()) for name, first in twins.items()}
    if not shape.checkpointing:
        return outside + sum(sizes.values()), last[0].dtype.itemsize
    entering = sum(inputs[first] for first in twins.values())
    return outside + entering + max(sizes.values(), default=0), last[0].dtype.itemsize


def _signature(block: nn.Module) -> Any:
    tensors = [(n, tuple(t.shape), t.dtype) for n, t in [*block.named_parameters(), *block.named_buffers()]]
    kind = getattr(block, "attention_type", None)
    return type(block), tuple(tensors), kind


def _watch(block: nn.Module, name: str, runs: bool, where: list[str], inputs: dict[str, int]) -> Callable[[], None]:
    """Note what a block keeps, or leave it out and pass its input on; what undoes that."""
    own = block.forward

    def watched(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs[name] = hidden.untyped_storage().nbytes()
        if not runs:
            return hidden
        where[0] = name
        try:
            return own(hidden, *args, **kwargs)
        finally:
            where[0] = ""

    block.__dict__["forward"] = watched
    return lambda: block.__dict__.pop("forward") and None


def _logit_bytes(model: PreTrainedModel, shape: Shape, width: int) -> int:
    """Bytes at the loss's peak, if every token is trained: logits, their fp32 form, log-probabilities, gradient."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = shape.rows * shape.length
    if shape.chunked:
        tokens = min(tokens, max(1, CHUNK_LOGITS // vocabulary))
    fp32 = 4 if width < 8 else 8
    plain = 0 if shape.chunked else width  # the model's own logits, of which the trained ones are a copy
    return tokens * vocabulary * (plain + width + (fp32 if width < fp32 else 0) + 2 * fp32)


# ----------------------------------------------------------------------- weights


def _weight_bytes(model: PreTrainedModel, spec: BaseSpec) -> dict[int, int]:
    """Bytes of each of the base's parameters, by id."""
    stored = getattr(torch, spec.dtype).itemsize
    packed: dict[int, int] = {}
    if spec.quantization != "none":
        head = model.get_output_embeddings()
        packed = {
            id(module.weight): _packed_bytes(cast(Tensor, module.weight).numel(), module, spec)
            for module in model.modules()
            if is_linear(module) and module is not head
        }
    return {id(p): packed.get(id(p), p.numel() * stored) for p in model.parameters()}


def _gathered(model: PreTrainedModel, sizes: dict[int, int], shards: int, blocks: int = 2) -> int:
    """Bytes on one device of parameters of these sizes, by id: its share, and the largest part that is whole at a time.

    The root stays gathered through the step; of the blocks the running one, and the next on its way. Gradients are
    whole in the root and in one block.
    """
    total = sum(sizes.values())
    if shards == 1:
        return total
    each = [sum(sizes.get(id(p), 0) for p in block.parameters()) for block in blocks_of(model).values()]
    root = total - sum(each)
    return -(-total // shards) + root + blocks * max(each, default=0)


def _packed_bytes(numel: int, module: nn.Module, spec: BaseSpec) -> int:
    """Bytes of a quantised weight: codes, scales, and the table of codes."""
    if spec.quantization == "int8":
        return numel + 4 * linear_shape(module)[0]
    scales = -(-numel // 64)
    table = 16 * 4
    if not spec.double_quant:
        return numel // 2 + 4 * scales + table
    return numel // 2 + scales + 4 * -(-scales // 256) + 256 * 4 + 4 + table


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
