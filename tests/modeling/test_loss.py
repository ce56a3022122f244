"""The chunked loss is the plain loss, in value and gradient, with less memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from secura_lightning.adapters import FullConfig, LoRAConfig, SECURAConfig, inject
from secura_lightning.data.encode import IGNORED
from secura_lightning.errors import ConfigError
from secura_lightning.modeling import loss as module
from secura_lightning.modeling.loss import ChunkedLoss, chunked_cross_entropy, summed_cross_entropy

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma2 (softcap)": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "granite (divides)": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "cohere (multiplies)": lambda: CohereForCausalLM(
        CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, **NO_DROPOUT)),
}
HEADS = {
    "frozen head": LoRAConfig(rank=4, targets="all-linear"),
    "LoRA on the head": LoRAConfig(rank=4, targets=["lm_head"]),
    "SECURA on the head": SECURAConfig(c=4, a=6, targets=["lm_head"]),
    "trained head": FullConfig(targets="everything"),
}


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (3, 11), generator=generator)
    labels = ids.clone()
    labels[:, :4] = IGNORED
    labels[1, 8:] = IGNORED
    mask = (torch.arange(11) < torch.tensor([[11], [8], [11]])).long()
    return {"input_ids": ids, "attention_mask": mask}, labels


def gradients(model: PreTrainedModel, adapters: Any, chunked: bool, autocast: bool = False) -> tuple[float, list[Any]]:
    inputs, labels = batch()
    parameters = adapters.trainable_parameters()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if chunked:
            answer = ChunkedLoss(model)
            answer.chunk = 5  # several chunks, the last one shorter
            total = answer(inputs, labels)
        else:
            total = summed_cross_entropy(model(**inputs).logits, labels)
        found = torch.autograd.grad(total * 0.37, parameters)
    return total.item(), list(found)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("head", HEADS)
def test_chunked_loss_equals_plain_loss(kind: str, head: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    adapters = inject(model, HEADS[head])
    for parameter in adapters.trainable_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    (plain, expected), (ours, found) = (gradients(model, adapters, chunked) for chunked in (False, True))
    assert ours == pytest.approx(plain, rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_chunked_loss_equals_plain_loss_under_autocast(head: str) -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]()
    adapters = inject(model, HEADS[head])
    for parameter in adapters.trainable_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    (plain, expected), (ours, found) = (gradients(model, adapters, chunked, True) for chunked in (False, True))
    assert ours == pytest.approx(plain, rel=1e-4)
    for one, other in zip(found, expected, strict=True):  # bf16 sums in another order
        assert (one - other).norm() <= 0.02 * other.norm()


def test_parts_of_a_batch_are_summed_apart() -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]().double()
    parameters = inject(model, HEADS["LoRA on the head"]).trainable_parameters()
    for parameter in parameters:
        parameter.data += 0.05 * torch.randn_like(parameter)
    answer, (inputs, labels) = ChunkedLoss(model), batch()
    found = answer.by_part(inputs, labels, [2, 1])
    for part, rows in zip(found, (slice(0, 2), slice(2, 3)), strict=True):
        alone = answer({name: value[rows] for name, value in inputs.items()}, labels[rows])
        torch.testing.assert_close(part, alone)
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (part, alone)]
        torch.testing.assert_close(*gradients)


def test_without_gradients_no_gradient_is_taken() -> None:
    hidden, targets = torch.randn(7, 4), torch.randint(9, (7,))
    head = nn.Linear(4, 9)
    with torch.no_grad():
        value = chunked_cross_entropy(hidden, targets, head, list(head.parameters()), 3)
    assert not value.requires_grad
    torch.testing.assert_close(value, nn.functional.cross_entropy(head(hidden), targets, reduction="sum").detach())


def test_a_rank_without_trained_tokens_contributes_zero() -> None:
    head = nn.Linear(4, 9)
    hidden = torch.zeros(0, 4, requires_grad=True)
    value = chunked_cross_entropy(hidden, torch.zeros(0, dtype=torch.long), head, list(head.parameters()), 3)
    value.backward()
    assert value.item() == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_model_that_does_more_to_its_logits_is_refused() -> None:
    class Odd(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 1.5
            return output

    with pytest.raises(ConfigError, match=r"^model\.chunked_loss: Odd .* set model\.chunked_loss: false$"):
        ChunkedLoss(Odd(LlamaConfig(**SIZES)))


def test_the_head_is_itself_again_after_a_failing_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama"]()
    answer = ChunkedLoss(model)
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        answer(*batch())
    assert "forward" not in model.lm_head.__dict__


MEMORY = """
import re, sys, torch
from torch import nn
from secura_lightning.modeling.loss import chunked_cross_entropy
torch.set_num_threads(1)
def peak():  # in MiB; getrusage's would begin with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
n, d, v = 2048, 64, 32768
head = nn.Linear(d, v, bias=False).requires_grad_(False)
hidden, targets = torch.randn(n, d, requires_grad=True), torch.randint(v, (n,))
chunked_cross_entropy(hidden[:256], targets[:256], head, (), 128).backward()  # libraries take their memory now
before = peak()
if sys.argv[1] == "chunked":
    chunked_cross_entropy(hidden, targets, head, (), 128).backward()
else:
    nn.functional.cross_entropy(head(hidden), targets, reduction="sum").backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_chunked_loss_holds_a_fraction_of_the_logits() -> None:
    taken = {
        kind: float(subprocess.run([sys.executable, "-c", MEMORY, kind], capture_output=True, check=True).stdout)
        for kind in ("plain", "chunked")
    }
    logits = 2048 * 32768 * 4 / 2**20  # 256 MiB in fp32
    assert taken["plain"] > 1.9 * logits  # so that the measure measures
    assert taken["chunked"] < 0.35 * taken["plain"]  # a chunk's logits are 16 MiB; malloc keeps some freed chunks


def test_a_chunk_is_sized_by_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", 970)
    assert ChunkedLoss(MODELS["llama"]()).chunk == 10
