"""Whether a model keeps packed rows apart.

Rows that share a line must not see each other. Transformers builds that mask from the positions alone, and only for
models and attention kernels that take part in it; a model with recurrent layers, or a kernel that ignores the mask,
would mix the rows without a word. So the model itself is asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secura_lightning.data.encode import Encoded, collate_packed
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation.batching import evaluating

_LENGTHS = ((5, 7, 4), (6, 9))  # tokens of the rows of two lines; the second is padded


def check_packing(model: PreTrainedModel) -> None:
    """Refuse packing where a row's logits depend on what else is in its line.

    Two things are compared: a row's logits when the other rows of its line change (nothing may change), and its
    logits against those of the row alone.

    Raises:
        ConfigError: They differ.
    """
    vocabulary = min(model.config.get_text_config().vocab_size, 1000)
    generator = torch.Generator().manual_seed(0)
    lines = [[_row(length, vocabulary, generator) for length in line] for line in _LENGTHS]
    others = [[_row(len(row.ids), vocabulary, generator) for row in line[:-1]] + line[-1:] for line in lines]
    with evaluating(model) as device:
        packed, changed = (forward_packed(model, collate_packed(rows, 0), device).float() for rows in (lines, others))
        for i, line in enumerate(lines):
            last = line[-1]
            end = sum(len(row.ids) for row in line)
            place = slice(end - len(last.ids), end)
            alone = model(input_ids=torch.tensor([list(last.ids)], device=device), use_cache=False).logits[0].float()
            scale = float(alone.std()) or 1.0
            leak = float((packed[i, place] - changed[i, place]).abs().max()) / scale
            error = float((packed[i, place] - alone).abs().max()) / scale
            tolerance = 1e-3 if packed.dtype == torch.float32 and _full_precision(model) else 0.1
            if leak > 1e-5 or error > tolerance:
                kernel = getattr(model.config, "_attn_implementation", None) or "attention"
                raise ConfigError(
                    f"data.packing: {type(model).__name__} with {kernel} does not keep packed rows apart (a row's "
                    f"logits move by {leak:.1e} with its neighbours, and lie {error:.1e} from the row's own); "
                    "set data.packing: false, or model.attn_implementation to sdpa or eager"
                )


def forward_packed(model: PreTrainedModel, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """Logits of a packed batch, ``[b, t, v]``."""
    output: Any = model(**packed_inputs({key: value.to(device) for key, value in batch.items()}))
    logits: Tensor = output.logits
    return logits


def packed_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What a model is called with for a batch of :class:`~secura_lightning.data.batches.SequenceBatches`.

    With positions the mask is left out: only then does transformers read them as the rows' boundaries.
    """
    if "position_ids" not in batch:
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}


def _row(length: int, vocabulary: int, generator: torch.Generator) -> Encoded:
    return Encoded(torch.randint(vocabulary, (length,), generator=generator).tolist(), 1)


def _full_precision(model: PreTrainedModel) -> bool:
    return all(p.dtype == torch.float32 for p in model.parameters())
