"""Full fine-tuning: everything trains, ties hold, weight decay pulls the weight itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from secura_lightning.adapters import FullConfig, LoRAConfig, inject
from secura_lightning.adapters.full import FullLayer
from secura_lightning.errors import ConfigError
from tests.adapters.toy import IDS, ToyModel, train


def plain_training(steps: int, lr: float) -> ToyModel:
    model = ToyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten().flip(0)).backward()
        optimizer.step()
    return model


def test_everything_is_ordinary_training() -> None:
    model = ToyModel()
    adapters = inject(model, FullConfig(targets="everything"))
    train(model, adapters, steps=4)
    expected = plain_training(4, 1e-2)
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-4, atol=1e-5)
    assert adapters.merge_() == []
    assert model.lm_head.weight is model.embed.weight
    assert model.layers[0].twin_a.weight is model.layers[0].twin_b.weight
    wanted = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=1e-5)


def test_tied_weights_train_as_one() -> None:
    model = ToyModel()
    adapters = inject(model, FullConfig(targets="everything"))
    assert model.lm_head.tuned_weight is model.embed.tuned_weight
    total = sum(p.numel() for p in ToyModel().parameters())
    assert sum(p.numel() for p in adapters.trainable_parameters()) == total
    assert "lm_head.tuned_weight" not in adapters.state_dict()


def test_all_linear_leaves_head_embedding_and_norms_alone() -> None:
    adapters = inject(ToyModel(), FullConfig())
    assert {name.split(".")[-1] for name in adapters.layers} == {"q_proj", "o_proj", "fc", "twin_a", "twin_b"}


def test_half_of_a_tied_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match="names lm_head, whose weight is tied to embed: name both, or neither"):
        inject(ToyModel(), FullConfig(targets=["lm_head"]))
    adapters = inject(ToyModel(), FullConfig(targets=["lm_head", "embed"]))
    assert list(adapters.layers) == ["embed", "lm_head"]


def test_quantised_weight_is_refused() -> None:
    class Linear4bit(nn.Linear):
        """Known by its name, as bitsandbytes' is."""

    with pytest.raises(ConfigError, match=r"FullConfig cannot train 0, whose weight is quantised.*LoRAConfig"):
        inject(nn.Sequential(Linear4bit(4, 4)), FullConfig())


def test_parameters_of_unknown_kind_are_refused() -> None:
    model = nn.Sequential(nn.PReLU(), nn.Bilinear(3, 3, 2))
    model[0].register_parameter("slope", nn.Parameter(torch.ones(1)))
    with pytest.raises(ConfigError, match=r"0 \(PReLU\) owns parameters that full fine-tuning does not know \(slope\)"):
        inject(model, FullConfig(targets="everything"))


def test_weight_decay_acts_on_the_weight_itself() -> None:
    layer = FullLayer(nn.Linear(3, 3))
    before = layer.tuned_weight.detach().clone()
    layer.tuned_weight.grad = torch.zeros_like(before)
    torch.optim.AdamW([layer.tuned_weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(layer.tuned_weight.detach(), before * 0.95)


def test_weight_in_use_follows_the_switch() -> None:
    layer = FullLayer(nn.Linear(3, 3))
    layer.tuned_weight.data += 1
    assert layer.weight is layer.tuned_weight
    layer.enabled = False
    assert layer.weight is layer.base.weight


def test_weight_decay_of_a_bf16_base_is_not_swallowed() -> None:
    layer = FullLayer(nn.Linear(3, 3).to(torch.bfloat16))
    assert layer.tuned_weight.dtype == torch.float32
    layer.tuned_weight.data *= 1 + 1e-4
    assert (layer.delta_weight() != 0).all()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("config", [FullConfig(targets="everything"), FullConfig(), LoRAConfig(rank=2)], ids=repr)
def test_transformers_may_tie_weights_again(config: FullConfig | LoRAConfig) -> None:
    model, ids = tiny_llama(), torch.arange(6).unsqueeze(0)
    base_logits = model(ids).logits
    adapters = inject(model, config)
    for parameter in adapters.trainable_parameters():
        parameter.data += 0.05
    expected, names = model(ids).logits, [name for name, _ in model.named_parameters()]
    model.tie_weights()
    assert torch.equal(model(ids).logits, expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with adapters.disabled():
        assert torch.equal(model(ids).logits, base_logits)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    adapters.merge_()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)


def test_all_linear_finds_the_seven_kinds_of_a_llama_block() -> None:
    adapters = inject(tiny_llama(), LoRAConfig(rank=2))
    kinds = {name.split(".")[-1] for name in adapters.layers}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(adapters.layers) == 14
