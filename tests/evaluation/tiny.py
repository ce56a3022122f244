"""A model small enough for unit tests of evaluation: random Llama, byte-level tokenizer, tasks over given rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secura_lightning.data.probe import Probe
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split, Task


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus beginning, end and padding: nothing to train."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.4,  # far from uniform, so that a misplaced position or token shows
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def chain_llama(follows: dict[str, str]) -> LlamaForCausalLM:
    """A Llama that says after each character the one that ``follows`` names, after any other end of sequence.

    Attention and MLP add nothing; embeddings are one-hot, so that the head reads the last token alone.
    """
    tokenizer = byte_tokenizer()
    model = tiny_llama(hidden_size=260, num_hidden_layers=1, num_attention_heads=5, num_key_value_heads=5)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(259, 260))
        model.lm_head.weight.zero_()
        for token in range(259):
            after = follows.get(tokenizer.decode([token]))
            target = tokenizer.eos_token_id if after is None else tokenizer(after)["input_ids"][0]
            model.lm_head.weight[target, token] = 1.0
    return model


class ListTask(Task):
    """A task over given rows."""

    def __init__(self, name: str, rows: Sequence[Row], metric: str = "exact", max_new_tokens: int = 4) -> None:
        super().__init__(name, metric, max_new_tokens)
        self._given = list(rows)

    def load(self, split: Split) -> list[Row]:
        return self._given


class ListProbe(Probe):
    """A probe over given rows and texts."""

    def __init__(self, rows: Sequence[Row], texts: Sequence[str] = ()) -> None:
        super().__init__("facts", max_new_tokens=4)
        self._given, self._texts = list(rows), list(texts)

    def rows(self) -> list[Row]:
        return self._given

    def texts(self) -> list[str]:
        return self._texts
