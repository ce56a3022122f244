"""`secura plan` against what a real model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from secura_lightning.adapters import (
    AdapterConfig,
    CURLoRAConfig,
    DoRAConfig,
    FullConfig,
    LoRAConfig,
    LoRANullConfig,
    LoRANullSequenceConfig,
    MiLoRAConfig,
    SECURAConfig,
    inject,
)
from secura_lightning.cli import plan as command
from secura_lightning.cli.main import main
from secura_lightning.modeling import fake as module
from secura_lightning.modeling.gram import stream_grams
from secura_lightning.modeling.load import BaseSpec, load_model
from secura_lightning.modeling.plan import Shape, estimate, optimizer_bytes

SHAPE = Shape(rows=2, length=24)
CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoRAConfig(rank=4),
    "lora row": LoRAConfig(rank=4, norm="row", targets=["q_proj", "down_proj"]),
    "dora": DoRAConfig(rank=4, bias=True),
    "milora": MiLoRAConfig(rank=4),
    "null": LoRANullConfig(rank=4),
    "curlora": CURLoRAConfig(rank=8),
    "secura": SECURAConfig(c=16, a=24, norm="element"),
    "secura base": SECURAConfig(c=16, a=24, norm="row", fusion="base", restraint=True),
    "full": FullConfig(targets="everything"),
}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def measure(spec: BaseSpec, config: AdapterConfig, autocast: torch.dtype | None = None) -> dict[str, int]:
    """The same quantities of a real model, after one real step."""
    model = load_model(spec)
    found = {"parameters": sum(p.numel() for p in model.parameters()), "weights": _size(model.parameters())}
    found["buffers"] = _size(model.buffers())
    theirs = {id(t) for t in [*model.parameters(), *model.buffers()]}
    adapters = inject(model, config)
    trained = adapters.trainable_parameters()
    found["trainable"] = sum(p.numel() for p in trained)
    found["adapters"] = _size({id(t): t for t in [*trained, *model.buffers()] if id(t) not in theirs}.values())
    weights = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.ones(SHAPE.rows, SHAPE.length, dtype=torch.long)
    with (
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = model(ids, logits_to_keep=1).logits.float().sum()
    loss.backward()
    found["activations"] = sum(kept.values())
    optimizer = adamw(trained)
    optimizer.step()
    found["gradients"] = _size(p.grad for p in trained)
    found["optimizer"] = _size(v for state in optimizer.state.values() for v in state.values())
    return found


def _size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


QUICK = ("lora", "secura", "full")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_every_adapter_is_planned_as_it_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", 160 * 160)  # so that the larger matrices are shaped by primes
    memory = estimate(BaseSpec(), CONFIGS[name], SHAPE, adamw)
    real = measure(BaseSpec(), CONFIGS[name])
    for key in ("parameters", "trainable", "weights", "adapters", "gradients", "optimizer", "buffers"):
        assert getattr(memory, key) == real[key], key
    assert memory.activations == pytest.approx(real["activations"], rel=0.03)


def test_kept_moments_are_planned_as_they_are_measured() -> None:
    spec, config = BaseSpec(), LoRANullSequenceConfig(rank=4)
    memory = estimate(spec, config, SHAPE, adamw)
    model = load_model(spec)
    adapters = inject(model, config)
    sequences = [[1, 5, 9, 4], [7, 3]]

    def take(names: list[str], gram: torch.Tensor) -> None:
        first, *others = (adapters.layers[name] for name in names)
        first.calibrate(gram, others)

    with torch.no_grad():
        stream_grams(model, dict(adapters.layers), sequences, take)
    assert memory.moments == _size(value for key, value in adapters.state_dict().items() if key.endswith(".gram"))
    assert "and 4.0 MB of the CPU's memory, and of every checkpoint" in command.table(memory, SHAPE, "pocket")


@pytest.mark.parametrize(("dtype", "autocast"), [("bfloat16", None), ("float32", torch.bfloat16), ("float64", None)])
def test_every_precision_is_planned_as_it_is_measured(dtype: Any, autocast: torch.dtype | None) -> None:
    spec = BaseSpec(dtype=dtype)
    memory = estimate(spec, LoRAConfig(rank=4), Shape(SHAPE.rows, SHAPE.length, autocast), adamw)
    real = measure(spec, LoRAConfig(rank=4), autocast)
    for key in ("trainable", "weights", "adapters", "gradients", "optimizer"):
        assert getattr(memory, key) == real[key], key
    assert memory.activations == pytest.approx(real["activations"], rel=0.05)


@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_weights_are_planned_as_they_are_measured(double_quant: bool) -> None:
    spec = BaseSpec(quantization="nf4", double_quant=double_quant)
    real = 0
    for parameter in load_model(spec).parameters():
        real += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            inner = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
            real += _size([state.absmax, state.code, *inner])
    assert estimate(spec, LoRAConfig(rank=4), SHAPE, adamw).weights == pytest.approx(real, rel=1e-3)


def test_what_saves_memory_is_planned_to_save_it() -> None:
    def total(**changes: Any) -> Any:
        return estimate(BaseSpec(), LoRAConfig(rank=4), Shape(rows=8, length=64, **changes), adamw)

    plain, recomputed, spread = total(), total(checkpointing=True), total(shards=2)
    assert recomputed.activations < 0.5 * plain.activations
    assert spread.weights < plain.weights + 0.5 * plain.weights  # a share, the root and two blocks of four
    large = {"rows": 8, "length": 4096}
    whole = estimate(BaseSpec(), LoRAConfig(rank=4), Shape(**large), adamw).logits
    assert estimate(BaseSpec(), LoRAConfig(rank=4), Shape(**large, chunked=True), adamw).logits < 0.4 * whole


def test_sharded_full_fine_tuning_is_planned_by_shares() -> None:
    config = FullConfig(targets="everything")
    one, four = (estimate(BaseSpec(), config, Shape(rows=2, length=24, shards=n), adamw) for n in (1, 4))
    assert four.trainable == one.trainable
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=1e-3)
    root = 4 * (one.trainable - 4 * _block_size())
    assert four.gradients == pytest.approx(one.gradients / 4 + root + 4 * _block_size(), abs=4)
    assert four.adapters == pytest.approx(one.adapters / 4 + root + 2 * 4 * _block_size(), abs=4)
    whole, shared = (estimate(BaseSpec(), LoRAConfig(rank=4), Shape(2, 24, shards=n), adamw) for n in (1, 4))
    assert (whole.adapters, whole.gradients, whole.optimizer) == (shared.adapters, shared.gradients, shared.optimizer)


def _block_size() -> int:
    return sum(p.numel() for p in load_model(BaseSpec()).model.layers[0].parameters())


def test_an_optimizers_state_is_measured_on_two_small_parameters() -> None:
    parameter = nn.Parameter(torch.zeros(1000, 256))
    assert optimizer_bytes(adamw)(parameter) == 8 * 256000 + 4
    assert optimizer_bytes(lambda p: torch.optim.SGD(p, lr=1.0))(parameter) == 0
    bitsandbytes = pytest.importorskip("bitsandbytes")
    eight = optimizer_bytes(lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1.0))(parameter)
    assert eight == pytest.approx(2 * 256000 * (1 + 4 / 256) + 2048, rel=1e-3)


def test_the_shape_of_a_large_model_takes_no_memory(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    spec = BaseSpec(base=str(tmp_path), dtype="bfloat16")
    config = SECURAConfig(c=150, a=200, targets=["q_proj", "v_proj"], norm="row")
    shape = Shape(rows=2, length=1024, autocast=torch.bfloat16, checkpointing=True, chunked=True)
    memory = estimate(spec, config, shape, adamw)
    assert memory.parameters == 8_030_261_248  # Llama-3.1-8B
    assert memory.weights == 2 * memory.parameters
    assert memory.trainable == 32 * 2 * 2 * 150 * 200
    assert memory.gradients == 4 * memory.trainable
    assert 14.9 < memory.weights / 2**30 < 15.0
    assert memory.activations < 3 * 2**30


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2] / "configs"
    assert (
        main(["plan", "--config", str(root / "quickstart.yaml"), "--config", str(root / "overlays" / "bf16.yaml")]) == 0
    )
    text = capsys.readouterr().out
    assert "pocket: 1,445,280 parameters, 1,146,880 trained" in text
    assert "per device, for 8 rows of 128 tokens:" in text
    assert [line.split()[0] for line in text.splitlines()[2:10]] == [
        *("base", "adapters", "gradients", "optimizer", "buffers", "activations", "logits", "total")
    ]


@pytest.mark.parametrize(
    ("devices", "count"), [(2, 2), ("4", 4), ([0, 1, 2], 3), ("0,3", 2), ("auto", 1), (None, 1), (-1, 1)]
)
def test_devices_are_counted_as_lightning_counts_them(
    devices: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert command.device_count(devices) == count


def test_a_combination_that_cannot_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2] / "configs"
    files = [root / "quickstart.yaml", root / "overlays" / "nf4.yaml", root / "overlays" / "fsdp.yaml"]
    assert main(["plan", *(part for file in files for part in ("--config", str(file)))]) == 2
    assert "model.quantization: nf4 cannot be sharded" in capsys.readouterr().err


def test_sizes_are_readable() -> None:
    assert [command.human(n) for n in (3, 2048, 5 * 2**20, 3 * 2**30)] == ["3 B", "2.0 KB", "5.0 MB", "3.00 GB"]
