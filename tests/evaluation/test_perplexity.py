import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from secura_lightning.data.encode import encode_texts
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation import perplexity as module
from secura_lightning.evaluation.perplexity import perplexity, perplexity_of, token_loss, windows

TEXTS = ["A short one.", "A document that is quite a bit longer than the first.", "x"]


@given(st.integers(0, 60), st.integers(2, 20), st.integers(1, 19))
def test_windows_score_every_token_but_the_first_once(n: int, length: int, stride: int) -> None:
    stride = min(stride, length - 1)
    scored = []
    for start, first, end in windows(n, length, stride):
        assert start < first < end <= start + length  # something to score, each with a token before it
        scored += range(first, end)
    assert scored == list(range(1, n))


def by_hand(model: LlamaForCausalLM, ids: list[int]) -> float:
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(scores[i - 1, ids[i]]) for i in range(1, len(ids)))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_is_weighted_by_tokens_not_documents(
    batch_size: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoded = [encode_texts(tokenizer, [text])[0] for text in TEXTS]
    tokens = sum(len(ids) - 1 for ids in encoded)
    wanted = math.exp(sum(by_hand(model, ids) for ids in encoded) / tokens)
    found, n = perplexity(model, tokenizer, TEXTS, batch_size)
    assert n == tokens
    assert found == pytest.approx(wanted, rel=1e-5)


def test_long_document_is_read_in_windows(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "abcdefghij" * 3
    ids = encode_texts(tokenizer, [text])[0]  # 32 tokens
    loss, count = token_loss(model, tokenizer, [text], max_length=20, stride=12)
    assert count == len(ids) - 1
    with torch.no_grad():
        tail = model(torch.tensor([ids[12:]])).logits[0].log_softmax(-1)
    second = -sum(float(tail[i - 13, ids[i]]) for i in range(20, 32))
    assert loss == pytest.approx(by_hand(model, ids[:20]) + second, rel=1e-5)


def test_uniform_model_has_its_vocabulary_as_perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokenizer, TEXTS)[0] == pytest.approx(259, rel=1e-5)


def test_memory_bound_splits_batches_without_changing_the_value(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = perplexity(model, tokenizer, TEXTS * 4)
    shapes = []
    model.register_forward_hook(lambda *call: shapes.append(call[-1].logits.shape[:2].numel()))
    monkeypatch.setattr(module, "LOGITS_BUDGET", 60 * 259)
    found = perplexity(model, tokenizer, TEXTS * 4)
    assert max(shapes) <= 60
    assert found == (pytest.approx(wanted[0], rel=1e-6), wanted[1])


def test_nothing_to_score_is_not_a_number(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    value, n = perplexity(model, tokenizer, [])
    assert np.isnan(value)
    assert n == 0
    assert perplexity_of(1e6, 2) == (math.inf, 2)


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 9), (1, None)])
def test_stride_that_skips_tokens_is_refused(
    length: int, stride: int | None, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match="must be at least 1 and below max_length"):
        perplexity(model, tokenizer, TEXTS, max_length=length, stride=stride)
