"""What every kind of evaluation shares: a quiet evaluation mode, batches by length, left padding, sharding by rank."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.data.rows import Row

T = TypeVar("T")

LOGITS_BUDGET = 2**27  # most logits of one batch (512 MiB in fp32), whatever the vocabulary


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[torch.device]:
    """Evaluation mode without gradients; afterwards training flags and random state are as they were.

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
        with torch.random.fork_rng(devices), torch.no_grad():
            yield device
    finally:
        for module in training:
            module.training = True


def batches(lengths: Sequence[int], batch_size: int, max_tokens: int | None = None) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that a batch too large for memory fails at once.

    Args:
        lengths: Tokens of each sequence.
        batch_size: Most sequences of a batch.
        max_tokens: Most tokens of a padded batch; a sequence longer than that is a batch of its own.
    """
    result: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = not result or len(result[-1]) == batch_size
        if full or (max_tokens is not None and (len(result[-1]) + 1) * width > max_tokens):
            result.append([])
            width = lengths[i]
        result[-1].append(i)
    return result


def left_pad(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Sequences side by side, aligned at their end.

    Returns:
        ``input_ids``, ``attention_mask`` and ``position_ids`` (padding does not count), each ``[b, t]`` of int64.
    """
    width = max(map(len, sequences))
    ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def context_length(model: PreTrainedModel, reserve: int = 0) -> int | None:
    """The longest prompt that leaves ``reserve`` tokens of the model's context; None where it names no limit."""
    length = getattr(model.config, "max_position_embeddings", None)
    return None if length is None else max(2, length - reserve)


def fit(tokenizer: PreTrainedTokenizerBase, ids: list[int], room: int | None) -> list[int]:
    """``ids`` cut on the left to ``room`` tokens; the beginning-of-sequence token stays in front."""
    if room is None or len(ids) <= room:
        return ids
    if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        return [ids[0], *ids[len(ids) - room + 1 :]]
    return ids[len(ids) - room :]


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
    if not _distributed() or _sharded(model):
        return list(items)
    return list(items[dist.get_rank() :: dist.get_world_size()])


def gather(mine: Sequence[T], model: nn.Module | None = None) -> list[T]:
    """The inverse of :func:`shard` over results: all ranks' items in the original order, on every rank."""
    if not _distributed() or _sharded(model):
        return list(mine)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, list(mine))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def _sharded(model: nn.Module | None) -> bool:
    return model is not None and any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
