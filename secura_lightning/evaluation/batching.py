"""What every kind of evaluation shares: a quiet evaluation mode, batches by length, left padding, sharding by rank."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from secura_lightning.data.encode import common
from secura_lightning.data.rows import Row
from secura_lightning.modeling.shard import is_sharded

T = TypeVar("T")

_WORTH = 16  # tokens that prompts must share to be read apart: a forward more is worth some, not few
HELD_BUDGET = 2**31  # bytes of weights that adapters may keep on a CPU; on a GPU half of what is free
LOGITS_BUDGET = 2**27  # most logits of one batch (512 MiB in fp32), whatever the vocabulary


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[torch.device]:
    """Evaluation mode without gradients; afterwards training flags and random state are as they were.

    Adapters that rebuild a weight for every forward (``norm: element``) keep theirs meanwhile, as far as memory allows.

    Yields:
        The device that inputs belong on.
    """
    # Each module's own flag: a frozen base may rest in eval mode under a root that trains.
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    try:
        model.eval()
        # no_grad and not inference_mode: a tensor that an adapter caches here must stay usable in the next backward.
        with torch.random.fork_rng(devices), torch.no_grad(), ExitStack() as held:
            _hold_weights(model, device, held)
            yield device
    finally:
        for module in training:
            module.training = True


def _hold_weights(model: PreTrainedModel, device: torch.device, held: ExitStack) -> None:
    """Let the model's adapters keep their weights until ``held`` closes, one after another while there is room."""
    if is_sharded(model):
        return  # a rank has no room for whole weights
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else HELD_BUDGET
    for module in model.modules():
        size = module.held_bytes() if hasattr(type(module), "holding") else 0  # type: ignore[operator]
        if 0 < size <= room:
            held.enter_context(module.holding())  # type: ignore[operator]
            room -= size


def batches(
    lengths: Sequence[int], batch_size: int, max_tokens: int | None = None, overhead: int = 256
) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that a batch too large for memory fails at once.

    Of all ways to cut the sorted sequences into batches it is one that costs least, where a batch costs its padded
    tokens and ``overhead``: many short batches waste passes, few long ones padding.

    Args:
        lengths: Tokens of each sequence.
        batch_size: Most sequences of a batch.
        max_tokens: Most tokens of a padded batch; a sequence longer than that is a batch of its own.
        overhead: What a batch costs beside its tokens, in tokens; see :func:`call_cost`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    width = np.array([lengths[i] for i in order], dtype=np.int64)
    cost = np.zeros(len(order) + 1, dtype=np.int64)  # of the first so many
    start = np.zeros(len(order) + 1, dtype=np.int64)  # of the batch that ends there
    for end in range(1, len(order) + 1):
        first = max(0, end - batch_size)
        sizes = (end - np.arange(first, end)) * width[first:end]
        costs = cost[first:end] + sizes + overhead
        if max_tokens is not None:
            costs[:-1][sizes[:-1] > max_tokens] = np.iinfo(np.int64).max
        best = int(costs.argmin())
        cost[end], start[end] = costs[best], first + best
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(int(start[cuts[-1]]))
    return [order[first:end] for end, first in reversed(list(pairwise(cuts)))]


def call_cost(device: torch.device) -> int:
    """What a forward pass costs beside its tokens, in tokens: little on a CPU, much on a GPU that waits for work."""
    return 64 if device.type == "cpu" else 2048


def most_tokens(device: torch.device) -> int | None:
    """Tokens beyond which a pass only gets slower for each of them, as on a CPU whose caches overflow; else None."""
    return 1280 if device.type == "cpu" else None


def left_pad(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device, width: int | None = None
) -> dict[str, Tensor]:
    """Sequences side by side, aligned at their end.

    Args:
        sequences: Token ids of each.
        pad: Token id that fills short ones.
        device: Where the result is put.
        width: Length of the result; by default that of the longest.

    Returns:
        ``input_ids``, ``attention_mask`` and ``position_ids`` (padding does not count), each ``[b, t]`` of int64.
    """
    width = max(map(len, sequences)) if width is None else width
    ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def read_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], keep: int, pad: int, device: torch.device
) -> tuple[DynamicCache, Tensor, Tensor]:
    """Prompts, read into a fresh cache; what they all begin with is read once.

    Args:
        model: The model.
        prompts: Token ids of each.
        keep: How many of the last tokens' logits are wanted; no prompt is shorter.
        pad: Token id that fills short prompts.
        device: Where the model is.

    Returns:
        The cache, logits of the last tokens ``[rows, keep, v]`` and the attention mask of what was read ``[rows, t]``.
    """
    width = max(map(len, prompts))
    most = most_tokens(device)
    # Only plain layers can be laid together; others read all prompts in one pass.
    if most is None or len(prompts) * width <= most or not has_plain_cache(model):
        cache = DynamicCache(config=model.config)
        return cache, *_read(model, prompts, cache, keep, pad, device, width)
    size = max(1, most // width)
    parts: list[tuple[DynamicCache, Tensor]] = []
    last: list[Tensor] = []
    for start in range(0, len(prompts), size):
        part = DynamicCache(config=model.config)
        logits, seen = _read(model, prompts[start : start + size], part, keep, pad, device, width)
        parts.append((part, seen))
        last.append(logits)
    cache, seen = lay_together(model, parts)
    return cache, torch.cat(last), seen


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether every layer keeps the keys and values of all tokens and nothing else."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def lay_together(model: PreTrainedModel, parts: Sequence[tuple[DynamicCache, Tensor]]) -> tuple[DynamicCache, Tensor]:
    """The rows of several plain caches in one, aligned at their end.

    Args:
        model: The model that they belong to.
        parts: Caches with their attention masks ``[rows, t]``; columns before any token are dropped.

    Returns:
        The cache and its attention mask.
    """
    skipped = [int(seen.any(0).int().argmax()) for _, seen in parts]
    width = max(seen.shape[1] - skip for (_, seen), skip in zip(parts, skipped, strict=True))

    def aligned(tensor: Tensor, place: int, dim: int) -> Tensor:
        """A part's tensor, cut or padded at the start of ``dim`` to the common width."""
        tensor = tensor.narrow(dim, skipped[place], tensor.shape[dim] - skipped[place])
        missing = list(tensor.shape)
        missing[dim] = width - tensor.shape[dim]
        return torch.cat([tensor.new_zeros(missing), tensor], dim) if missing[dim] else tensor

    cache = DynamicCache(config=model.config)
    for layer, *pieces in zip(cache.layers, *(part.layers for part, _ in parts), strict=True):
        assert isinstance(layer, DynamicLayer)
        keys, values = (
            torch.cat([aligned(getattr(piece, name), place, 2) for place, piece in enumerate(pieces)])
            for name in ("keys", "values")  # each [rows, heads, t, d]
        )
        layer.update(keys, values)
    return cache, torch.cat([aligned(seen, place, 1) for place, (_, seen) in enumerate(parts)])


def _read(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    cache: DynamicCache,
    keep: int,
    pad: int,
    device: torch.device,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Fill an empty cache with prompts, padded to ``width``; their last logits and their mask."""
    # At least the tokens whose logits are kept stay behind: the same number of each row then comes from one pass.
    prefix = min(common(prompts), min(map(len, prompts)) - keep)
    # Padding between prefix and prompt would stretch the distance that a sliding window counts.
    if len(prompts) > 1 and prefix >= _WORTH and not any(cache.is_sliding):
        head = torch.tensor([list(prompts[0][:prefix])], device=device)
        model(head, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    else:
        prefix = 0
    inputs = left_pad([ids[prefix:] for ids in prompts], pad, device, width - prefix)
    seen = inputs["attention_mask"]
    inputs["attention_mask"] = seen = torch.cat([seen.new_ones(len(prompts), prefix), seen], 1)
    inputs["position_ids"] += prefix
    logits: Tensor = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
    return logits, seen


def context_length(model: PreTrainedModel, reserve: int = 0) -> int | None:
    """The longest prompt that leaves ``reserve`` tokens of the model's context; None where it names no limit."""
    length = getattr(model.config, "max_position_embeddings", None)
    return None if length is None else max(2, length - reserve)


def subset(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """At most ``limit`` rows, spread evenly over kinds, always the same ones and in their order.

    A smaller limit gives a subset of a larger one's rows, so that scores on both move together.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)  # files are often sorted by class: the first rows would not represent them
    seen: dict[str, int] = {}
    ranked: list[tuple[int, int, int]] = []  # how many of its kind came before, place in the shuffle, row
    for i in order:
        turn = seen[rows[i].kind] = seen.get(rows[i].kind, 0) + 1
        ranked.append((turn, len(ranked), i))
    return [rows[i] for i in sorted(i for _, _, i in sorted(ranked)[:limit])]


def shard(items: Sequence[T], model: nn.Module | None = None) -> list[T]:
    """This rank's share: every world_size-th item. No padding, so ranks may differ by one and may be empty.

    The forward of a ``model`` whose weights are sharded needs all ranks at once: there each rank's share is all items.
    """
    if not _distributed() or is_sharded(model):
        return list(items)
    return list(items[dist.get_rank() :: dist.get_world_size()])


def gather(mine: Sequence[T], model: nn.Module | None = None) -> list[T]:
    """The inverse of :func:`shard` over results: all ranks' items in the original order, on every rank."""
    if not _distributed() or is_sharded(model):
        return list(mine)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, list(mine))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
