"""Packed rows give the logits and the loss of rows alone, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from secura_lightning.data.encode import Encoded, collate, collate_packed
from secura_lightning.errors import ConfigError
from secura_lightning.modeling.loss import summed_cross_entropy
from secura_lightning.modeling.packing import check_packing, packed_inputs
from tests.evaluation.tiny import tiny_llama

ROWS = [Encoded([5, 6, 7, 8, 9], 2), Encoded([11, 12, 13], 1), Encoded([21, 22], 0), Encoded(list(range(30, 39)), 4)]
LINES = [[ROWS[3]], [ROWS[0], ROWS[1]], [ROWS[2]]]


def sliding(kernel: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MistralForCausalLM(MistralConfig(
            vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, sliding_window=4, initializer_range=0.3, attn_implementation=kernel,
        )).eval()  # fmt: skip


MODELS: dict[str, Any] = {
    "llama-sdpa": lambda: tiny_llama(attn_implementation="sdpa"),
    "llama-eager": lambda: tiny_llama(attn_implementation="eager"),
    "sliding-window-sdpa": lambda: sliding("sdpa"),
    "sliding-window-eager": lambda: sliding("eager"),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_packed_rows_equal_those_of_rows_alone(name: str) -> None:
    model = MODELS[name]()
    model.config.use_cache = True  # as evaluation may have left it
    with torch.no_grad():
        packed = model(**packed_inputs(collate_packed(LINES, 0))).logits
        for line, logits in zip(LINES, packed, strict=True):
            start = 0
            for row in line:
                alone = model(torch.tensor([list(row.ids)])).logits[0]
                torch.testing.assert_close(logits[start : start + len(row.ids)], alone, rtol=1e-4, atol=1e-5)
                start += len(row.ids)
    check_packing(model)


def test_loss_and_gradient_of_a_packed_batch_equal_those_of_a_padded_one() -> None:
    found = []
    for batch in (collate(ROWS, 0), collate_packed(LINES, 0)):
        model = tiny_llama()
        loss = summed_cross_entropy(model(**packed_inputs(batch)).logits, batch["labels"])
        loss.backward()
        found.append((loss, model.model.layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_model_that_reads_across_rows_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=1))
    with pytest.raises(ConfigError, match=r"data.packing: MambaForCausalLM .* does not keep packed rows apart"):
        check_packing(model)


def test_a_mask_that_is_ignored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **inputs: forward(**inputs))
    with pytest.raises(ConfigError, match=r"set data\.packing: false"):
        check_packing(model)
