"""A base sharded over two processes trains what one process trains, for every adapter, and resumes anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secura_lightning.adapters import FullConfig, LoRAConfig
from secura_lightning.engine import check_optimizer
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.modeling.load import BaseSpec, fingerprint, load_model
from secura_lightning.modeling.shard import WeightFiles, check_shardable, empty_model
from secura_lightning.strategies.agem import AGEM
from secura_lightning.strategies.base import Strategy, check_sharded
from secura_lightning.strategies.buffer import ReplayBuffer
from secura_lightning.strategies.derpp import DERPP
from secura_lightning.strategies.er import ER
from secura_lightning.strategies.ewc import EWC
from secura_lightning.strategies.guard import RetentionGuard
from secura_lightning.strategies.ilora import ILoRA
from secura_lightning.strategies.l2sp import L2SP
from secura_lightning.strategies.lwf import LwF
from tests.distributed.conftest import EXACT, finished, run_jobs, write
from tests.distributed.test_ddp import assert_close, split
from tests.integration.conftest import Fit, fit_into

TARGETS = {"targets": ["q_proj", "down_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"class_path": "LoRAConfig", "init_args": {"rank": 2, **TARGETS, "targets": "all-linear"}},
    "dora": {"class_path": "DoRAConfig", "init_args": {"rank": 2, **TARGETS}},
    "pissa": {"class_path": "PiSSAConfig", "init_args": {"rank": 2, **TARGETS}},
    "milora": {"class_path": "MiLoRAConfig", "init_args": {"rank": 2, **TARGETS}},
    "curlora": {"class_path": "CURLoRAConfig", "init_args": {"rank": 4, **TARGETS}},
    "null": {"class_path": "LoRANullConfig", "init_args": {"rank": 4, **TARGETS}},
    "secura": {"class_path": "SECURAConfig", "init_args": {"c": 8, "a": 12, "norm": "element", **TARGETS}},
    "secura-base": {
        "class_path": "SECURAConfig",
        "init_args": {"c": 8, "a": 12, "norm": "row", "fusion": "base", "restraint": True, **TARGETS},
    },
    "full": {"class_path": "FullConfig", "init_args": TARGETS},
    "everything": {"class_path": "FullConfig", "init_args": {"targets": "everything"}},  # the tied head and embeddings
}
SHARDED = {
    "trainer.devices": 2,
    "trainer.strategy": {"class_path": "ShardedStrategy"},
    "trainer.callbacks": [{"class_path": "tests.distributed.callbacks.SameEverywhere"}],
}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 0.1}}
CALIBRATION = {
    "class_path": "SelfCalibration",
    "init_args": {"samples": 4, "max_length": 12, "batch_size": 2, "cache": None},
}


def changes_of(name: str) -> dict[str, Any]:
    changes: dict[str, Any] = {"model.adapter": ADAPTERS[name], "forgetting.limit": 4}
    if name == "null":
        changes["model.calibration"] = CALIBRATION
    if name == "everything":
        changes |= {"trainer.gradient_clip_val": 0.5, "model.optimizer": ADAMW}
    if name == "lora":  # everything that saves memory, in the same run
        changes |= {"model.chunked_loss": True, "model.activation_checkpointing": True}
    return changes


@pytest.mark.slow
def test_two_shards_equal_one_process_and_resume_on_another_number(tmp_path: Path) -> None:
    lines = [write(tmp_path, name, {**SHARDED, **split(4, 1), **changes_of(name)}) for name in ADAPTERS]
    for name in ("secura", "everything"):
        lines += [write(tmp_path, f"{name}-accumulated", {**SHARDED, **split(2, 2), **changes_of(name)})]
    run_jobs(tmp_path, lines)
    singles: dict[str, Fit] = {}
    for name in ADAPTERS:
        (tmp_path / name).mkdir()
        singles[name] = fit_into(tmp_path / name, {**EXACT, **split(8, 1), **changes_of(name)})
        assert_close(finished(tmp_path, name), singles[name], 1e-8)

    # After the second task, on one process and on two.
    lines = []
    for name in ("secura", "everything"):
        assert_close(finished(tmp_path, f"{name}-accumulated"), singles[name], 1e-8)
        middle = str(next(finished(tmp_path, name).folder.glob("checkpoints/task2-*.ckpt")))
        again = {**split(8, 1), **changes_of(name)}
        (tmp_path / f"{name}-again").mkdir()
        assert_close(
            fit_into(tmp_path / f"{name}-again", {**EXACT, **again}, ("--ckpt_path", middle)), singles[name], 1e-8
        )
        alone = str(next(singles[name].folder.glob("checkpoints/task2-*.ckpt")))
        two = write(tmp_path, f"{name}-resumed", {**SHARDED, **split(4, 1), **changes_of(name)})
        lines.append([*two, "--ckpt_path", alone])
    run_jobs(tmp_path, lines)
    for name in ("secura", "everything"):
        assert_close(finished(tmp_path, f"{name}-resumed"), singles[name], 1e-8)


def test_the_empty_model_is_the_model_without_its_weights() -> None:
    whole, empty = load_model(BaseSpec()), empty_model(BaseSpec())
    assert all(p.is_meta for p in empty.parameters())
    assert not any(b.is_meta for b in empty.buffers())
    for (name, one), (other_name, other) in zip(whole.named_parameters(), empty.named_parameters(), strict=True):
        assert (name, one.shape, one.dtype) == (other_name, other.shape, other.dtype)
    for one, other in zip(whole.buffers(), empty.buffers(), strict=True):
        assert torch.equal(one, other)
    assert empty.lm_head.weight is empty.model.embed_tokens.weight


def test_weight_files_give_every_tensor_of_the_model() -> None:
    whole = load_model(BaseSpec())
    with WeightFiles(BaseSpec()) as files:
        for name, value in whole.named_parameters():
            assert torch.equal(files[name], value)
        assert "nothing" not in files


def test_one_sharded_process_loads_what_load_model_loads(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from secura_lightning.modeling.shard import is_sharded, load_sharded

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        spec = BaseSpec(dtype="bfloat16")
        model, adapters, print_ = load_sharded(spec, LoRAConfig(rank=2), 0, mesh, torch.device("cpu"))
        whole = load_model(spec)
        assert is_sharded(model)
        assert not is_sharded(whole)
        assert print_ == fingerprint(whole)
        assert len(adapters.layers) == 28
        ids = torch.tensor([[1, 5, 9, 30]])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, whole(ids).logits)
    finally:
        dist.destroy_process_group()


def test_buffers_that_are_saved_with_the_weights_are_loaded_too(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AutoModelForCausalLM

    from secura_lightning.modeling.shard import load_sharded

    settings = pytest.importorskip("transformers.models.gemma4").Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
        vocab_size_per_layer_input=64, max_position_embeddings=64, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    saved = AutoModelForCausalLM.from_config(settings)
    for name, buffer in saved.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.3)
    saved.save_pretrained(tmp_path / "model")
    spec = BaseSpec(base=str(tmp_path / "model"))
    whole = load_model(spec).eval()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model, _, print_ = load_sharded(spec, LoRAConfig(targets=["q_proj"]), 0, mesh, torch.device("cpu"))
        assert float(dict(model.named_buffers())["model.layers.0.layer_scalar"]) == pytest.approx(0.3)
        assert print_ == fingerprint(whole)
        ids = torch.tensor([[1, 5, 9, 30]])
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(ids).logits, whole(ids).logits)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (BaseSpec(quantization="nf4"), r"model\.quantization: nf4 cannot be sharded"),
        (BaseSpec(init="random"), r"model\.init: random cannot be sharded"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_one_line(spec: BaseSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_shardable(spec)
    assert "\n" not in str(caught.value)
    assert "use " in str(caught.value)


STRATEGIES: list[Strategy] = [EWC(0.1), L2SP(1.0), ILoRA(), AGEM(), LwF(), RetentionGuard()]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_strategies_that_need_whole_weights_are_refused_where_these_are_sharded(strategy: Strategy) -> None:
    check_sharded([strategy], LoRAConfig())
    with pytest.raises(ConfigError, match=rf"trainer\.callbacks\.{type(strategy).__name__}: .*: use ") as caught:
        check_sharded([ReplayBuffer(), strategy], FullConfig())
    assert "\n" not in str(caught.value)


def test_rows_alone_go_with_sharded_weights() -> None:
    check_sharded([ReplayBuffer(), ER()], FullConfig())
    check_sharded([ReplayBuffer(), DERPP()], FullConfig())


def test_an_optimizer_that_knows_no_sharded_tensors_is_refused() -> None:
    optimizers = pytest.importorskip("bitsandbytes").optim
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    check_optimizer(torch.optim.AdamW(parameters))
    with pytest.raises(ConfigError, match=r"model\.optimizer: AdamW8bit of bitsandbytes .*: use torch\.optim\.AdamW"):
        check_optimizer(optimizers.AdamW8bit(parameters))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SecuraError, match="holds no safetensors weights"):
        WeightFiles(BaseSpec(base=str(tmp_path)))
