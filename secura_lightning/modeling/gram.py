"""Second moments G = sum x x^T of what linear layers read, one transformer block after another.

The hidden states of all sequences stand before one block; the block runs on every batch, its layers' moments are
complete, and only then does the next block begin. So the moments in memory are one block's, whatever the depth, and
every block runs once. Layers that read the same tensor (q, k, v; gate, up) share one matrix. Moments are un-centred, in
fp64, and leave padding out.

What a block needs beside its hidden states (masks, rotary angles) is recorded from the model's own forward, with the
blocks themselves left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secura_lightning.errors import SecuraError
from secura_lightning.evaluation.batching import batches

Batch = dict[str, Tensor]
Take = Callable[[list[str], Tensor], None]

_PANEL = 512  # rows of G that are computed together: small enough to skip most of the upper triangle


class _Stop(Exception):
    """Ends a forward pass early."""


def stream_grams(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    sequences: Sequence[Sequence[int]],
    take: Take,
    batch_size: int = 16,
    pad: int = 0,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Measure the inputs of ``layers`` and hand over each matrix as soon as it is complete.

    Args:
        model: The model, in evaluation mode and without gradients.
        layers: Modules of the model that read one tensor, by dotted name.
        sequences: Token ids.
        take: Called with the names of the layers that read one input, in the order in which they do, and its G [in, in]
            in fp64.
        batch_size: Sequences that run together.
        pad: Id that fills short sequences.
        progress: Called with 1 after every batch of every block; see :func:`count_steps`.

    Raises:
        SecuraError: A layer was never reached, or reads something else than one vector a token.
    """
    device = next(model.parameters()).device
    ready = [
        _right_pad([sequences[i] for i in batch], pad, device)
        for batch in batches(list(map(len, sequences)), batch_size)
    ]
    tick = progress or (lambda _: None)
    blocks = transformer_blocks(model, layers)
    inside = {name: i for i, block in enumerate(blocks) for name, m in layers.items() if _contains(block, m)}
    rest = {name: module for name, module in layers.items() if name not in inside}
    if inside:
        hidden = [_enter(model, blocks, batch)[0] for batch in ready]
        for i, block in enumerate(blocks[: max(inside.values()) + 1]):
            with _Moments({name: layers[name] for name, where in inside.items() if where == i}) as moments:
                for k, batch in enumerate(ready):
                    moments.mask = batch["attention_mask"].bool()
                    hidden[k] = _run_block(block, hidden[k], _enter(model, blocks, batch)[1][i])
                    tick(1)
            moments.hand_over(take)
    if rest:  # outside the blocks, such as an output head: one more pass over the whole model
        with _Moments(rest) as moments:
            for batch in ready:
                moments.mask = batch["attention_mask"].bool()
                model(**batch, use_cache=False)
                tick(1)
        moments.hand_over(take)


def count_steps(model: PreTrainedModel, layers: dict[str, nn.Module], n_sequences: int, batch_size: int) -> int:
    """How often :func:`stream_grams` will call its ``progress``."""
    blocks = transformer_blocks(model, layers)
    reached = [i for i, block in enumerate(blocks) if any(_contains(block, module) for module in layers.values())]
    outside = any(not any(_contains(block, module) for block in blocks) for module in layers.values())
    return -(-n_sequences // batch_size) * (max(reached, default=-1) + 1 + outside)


def transformer_blocks(model: nn.Module, layers: dict[str, nn.Module]) -> list[nn.Module]:
    """The model's blocks in order: the outermost module list that holds any of ``layers``, or nothing."""
    for _, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(_contains(module, layer) for layer in layers.values()):
            return list(module)
    return []


def _contains(parent: nn.Module, wanted: nn.Module) -> bool:
    return any(module is wanted for module in parent.modules())


def _right_pad(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> Batch:
    """``input_ids`` and ``attention_mask`` [b, t]."""
    width = max(map(len, sequences))
    ids = torch.tensor([list(ids) + [pad] * (width - len(ids)) for ids in sequences], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], device=device)
    return {"input_ids": ids, "attention_mask": mask}


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments after the hidden states, and keyword arguments."""


def _enter(model: PreTrainedModel, blocks: Sequence[nn.Module], batch: Batch) -> tuple[Tensor, list[Call]]:
    """The hidden states [b, t, d] that reach the first block, and how the model would call each block."""
    first: list[Tensor] = []
    calls: list[Call] = []

    def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first.append(hidden)
        calls.append((args, kwargs))
        if len(calls) == len(blocks):
            raise _Stop
        return hidden

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_forward_replaced(block, record))
        try:
            model(**batch, use_cache=False)
        except _Stop:
            return first[0], calls
    raise SecuraError(
        f"model.calibration: {type(model).__name__} does not run its {len(blocks)} blocks one after another on hidden "
        "states; choose another adapter than LoRA-Null"
    )


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")  # accelerate keeps a wrapped forward here
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    output = block(hidden, *call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


class _Moments:
    """Accumulates G of some layers while it is entered.

    Args:
        layers: By name.

    Attributes:
        mask: [b, t] which tokens of the running batch count.
    """

    mask: Tensor

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.grams: dict[str, Tensor] = {}  # by the first layer of those that share an input
        self.leader: dict[str, str] = {}
        self._running: dict[str, Tensor] = {}  # this batch's inputs: held, so that none takes another's address

    def __enter__(self) -> _Moments:
        self._hooks = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=False) for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        self._running.clear()
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def measure(_: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if name in self._running:  # the next batch
                self._running.clear()
            shared = next((other for other, seen in self._running.items() if seen is x), None)
            self._running[name] = x
            leader = self.leader.setdefault(name, name if shared is None else self.leader[shared])
            if leader == name:
                self._add(name, x)

        return measure

    def _add(self, name: str, x: Tensor) -> None:
        if x.shape[:-1] != self.mask.shape:
            raise SecuraError(
                f"model.calibration: {name} reads a tensor of shape {tuple(x.shape)}, not one vector for each of "
                f"{tuple(self.mask.shape)} tokens; leave it out with model.adapter.exclude"
            )
        tokens = x[self.mask]  # [n, in]
        # On a GPU fp64 is slow and each batch's sum is short: fp32 within a batch, fp64 over batches.
        tokens = tokens.double() if x.device.type == "cpu" else tokens.float()
        first = name not in self.grams
        if first:
            self.grams[name] = torch.empty(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
        _add_lower_(self.grams[name], tokens, beta=0 if first else 1)

    def hand_over(self, take: Take) -> None:
        """Pass every matrix on, with the layers that it belongs to, and free it.

        Raises:
            SecuraError: A layer was never reached.
        """
        missed = [name for name in self.layers if name not in self.leader]
        if missed:
            raise SecuraError(
                f"model.calibration: no text reached {missed[0]} ({len(missed)} such layers); take more samples, or "
                "leave them out with model.adapter.exclude"
            )
        for leader in list(self.grams):
            # `leader` has its keys in the order in which the model reached them, and a leader is the first of its own.
            take([name for name, first in self.leader.items() if first == leader], _mirror_(self.grams.pop(leader)))


def _add_lower_(gram: Tensor, tokens: Tensor, beta: int) -> None:
    """``beta`` G + x x^T over ``tokens`` [n, d] in the lower triangle of ``gram`` [d, d], in panels of rows.

    A symmetric matrix needs half the multiplications of a product of two. With ``beta`` 0 what ``gram`` holds does not
    matter; filling it first would cost a large matrix a pass over memory.
    """
    for start in range(0, len(gram), _PANEL):
        stop = min(start + _PANEL, len(gram))
        panel, out = tokens[:, start:stop].t(), gram[start:stop, :stop]
        if tokens.dtype == gram.dtype:
            out.addmm_(panel, tokens[:, :stop], beta=beta)
        elif beta:
            out.add_(panel @ tokens[:, :stop])
        else:
            out.copy_(panel @ tokens[:, :stop])


def _mirror_(gram: Tensor) -> Tensor:
    """Copy the lower triangle to the upper one, in the panels of :func:`_add_lower_`."""
    for start in range(_PANEL, len(gram), _PANEL):
        rows = gram[start : start + _PANEL, :start]
        gram[:start, start : start + _PANEL] = rows.t()
    return gram
