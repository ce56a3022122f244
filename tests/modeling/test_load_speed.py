"""Precision, recomputation, compilation and optimizers: each does what its key says, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from secura_lightning.adapters import SECURAConfig, inject
from secura_lightning.errors import ConfigError
from secura_lightning.modeling.load import BaseSpec, blocks_of, enable_checkpointing, load_model, stored_in
from secura_lightning.module import ContinualModule
from tests.integration.conftest import Fit, fit_into

SHORT: dict[str, Any] = {
    "model.init": "pretrained",
    "data.steps_per_task": [2, 1, 1],
    "data.probe": None,
    "forgetting.limit": 1,
    "model.adapter": {"class_path": "SECURAConfig", "init_args": {"c": 8, "a": 12, "norm": "row"}},
}


@pytest.fixture
def run(tmp_path: Any) -> Callable[..., Fit]:
    def go(changes: dict[str, Any], folder: str = "runs") -> Fit:
        return fit_into(tmp_path, {**SHORT, **changes}, folder=folder)

    return go


# -------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("precision", "stored", "output"),
    [
        pytest.param("32-true", torch.float32, torch.float32, marks=pytest.mark.slow),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        pytest.param("64-true", torch.float64, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_every_precision_keeps_adapters_wide(
    precision: str, stored: torch.dtype, output: torch.dtype, run: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[torch.dtype]] = {"base": set(), "adapter": set(), "gradient": set(), "output": set()}
    step = ContinualModule.training_step
    end = ContinualModule.on_step_end

    def watched(self: ContinualModule, batch: Any, batch_idx: int) -> Any:
        if not seen["output"]:
            layer = next(iter(self.adapters.layers.values()))
            layer.register_forward_hook(lambda _, __, y: seen["output"].add(y.dtype))
        return step(self, batch, batch_idx)

    def ended(self: ContinualModule) -> None:
        own = {id(p) for p in self.adapters.trainable_parameters()}
        seen["base"] |= {p.dtype for p in self.model.parameters() if id(p) not in own}
        seen["adapter"] |= {value.dtype for value in self.state_dict().values() if value.is_floating_point()}
        end(self)

    monkeypatch.setattr(ContinualModule, "training_step", watched)
    monkeypatch.setattr(ContinualModule, "on_step_end", ended)
    finished = run({"trainer.precision": precision})
    wide = torch.float64 if precision == "64-true" else torch.float32
    assert seen["base"] == {stored}
    assert seen["adapter"] == {wide}
    assert output in seen["output"]
    state = finished.checkpoint
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert state["secura"]["base"]["dtype"] == str(stored).removeprefix("torch.")


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_fp16_on_a_cpu_is_refused_in_one_line(precision: str, run: Callable[..., Fit]) -> None:
    with pytest.raises(ConfigError, match=rf"^trainer\.precision: {precision} needs a GPU; .*bf16-mixed") as caught:
        run({"trainer.precision": precision})
    assert "\n" not in str(caught.value)


def test_a_true_precision_is_the_bases_type() -> None:
    assert stored_in(BaseSpec(), "bf16-true").dtype == "bfloat16"
    for other in ("32-true", "bf16-mixed", "16-mixed"):
        assert stored_in(BaseSpec(dtype="bfloat16"), other) == BaseSpec(dtype="bfloat16")


# ---------------------------------------------------------------- recomputation


def test_activation_checkpointing_runs_every_block_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    gradients = []
    for recomputed in (False, True):
        model = load_model(BaseSpec(dtype="float64"))
        layers = inject(model, SECURAConfig(c=8, a=12))
        for parameter in layers.trainable_parameters():
            parameter.data += 0.01
        if recomputed:
            enable_checkpointing(model)
        calls[0] = 0
        model(torch.arange(12).unsqueeze(0)).logits.logsumexp(-1).sum().backward()
        assert calls[0] == len(blocks_of(model)) * (2 if recomputed else 1)
        gradients.append([p.grad for p in layers.trainable_parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_what_saves_memory_changes_nothing(run: Callable[..., Fit]) -> None:
    plain = run({"model.dtype": "float64"})
    saving = {"model.activation_checkpointing": True, "model.chunked_loss": True}
    other = run({"model.dtype": "float64", **saving, "data.num_workers": 1, "data.pin_memory": False}, "saving")
    torch.testing.assert_close(other.checkpoint["state_dict"], plain.checkpoint["state_dict"], rtol=0, atol=1e-8)


@pytest.mark.slow
def test_attention_kernels_agree(run: Callable[..., Fit]) -> None:
    one = run({"model.dtype": "float64", "data.steps_per_task": 1})
    other = run({"model.dtype": "float64", "data.steps_per_task": 1, "model.attn_implementation": "eager"}, "eager")
    # transformers' eager attention takes its softmax in fp32, whatever the model's type; Adam divides by tiny numbers.
    torch.testing.assert_close(other.checkpoint["state_dict"], one.checkpoint["state_dict"], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(run: Callable[..., Fit]) -> None:
    plain = run({"model.dtype": "float64", "data.steps_per_task": 1})
    other = run({"model.dtype": "float64", "data.steps_per_task": 1, "model.compile_blocks": True}, "compiled")
    torch.testing.assert_close(other.checkpoint["state_dict"], plain.checkpoint["state_dict"], rtol=0, atol=1e-8)


# -------------------------------------------------------------------- optimizers


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of nested lists and dictionaries: bitsandbytes wraps its state once more."""
    if torch.is_tensor(value):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_optimizers_of_bitsandbytes_run_and_resume(name: str, tmp_path: Any) -> None:
    optimizer = {"class_path": f"bitsandbytes.optim.{name}", "init_args": {"lr": 0.01}}
    changes = {**SHORT, "model.optimizer": optimizer, "model.adapter.init_args.c": 64, "model.adapter.init_args.a": 96}
    run = fit_into(tmp_path, changes)
    kinds = {tensor.dtype for tensor in _tensors(run.checkpoint["optimizer_states"])}
    assert (torch.uint8 in kinds) == ("8bit" in name)
    middle = str(run.folder / "checkpoints" / "task2-second.ckpt")
    again = fit_into(tmp_path, changes, ("--ckpt_path", middle), folder="again")
    for key, value in run.checkpoint["state_dict"].items():
        assert torch.equal(again.checkpoint["state_dict"][key], value), key
