"""model.liger: refused with the fix where it cannot work, else liger-kernel is asked, without its losses."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from secura_lightning.errors import ConfigError
from secura_lightning.modeling.liger import apply_liger

CUDA = torch.device("cuda")


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a stand-in for liger-kernel, which knows Llama alone, was called with."""
    found: list[dict[str, Any]] = []
    top, package, patch = (ModuleType(f"liger_kernel{rest}") for rest in ("", ".transformers", ".transformers.patch"))
    package._apply_liger_kernel_to_instance = lambda **given: found.append(given)  # type: ignore[attr-defined]
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", top)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patch)
    return found


def test_the_model_is_patched_and_keeps_its_loss(calls: list[dict[str, Any]]) -> None:
    model = llama()
    apply_liger(model, CUDA)
    assert calls == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_refused_on_a_cpu(calls: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"^model\.liger: .* CUDA GPU, .* on cpu: .* set model\.liger: false$"):
        apply_liger(llama(), torch.device("cpu"))
    assert not calls


def test_refused_for_an_architecture_without_kernels(calls: list[dict[str, Any]]) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"^model\.liger: .* no kernels for gpt2: .* set model\.liger: false$"):
        apply_liger(model, CUDA)
    assert not calls


def test_refused_without_liger_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)  # as if not installed
    with pytest.raises(ConfigError, match=r"^model\.liger: .* not installed: pip install 'secura_lightning\[liger\]'"):
        apply_liger(llama(), CUDA)
