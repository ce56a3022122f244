"""Overlays go on top of any configuration: parsed, built, and where this machine allows it, run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from secura_lightning.callbacks.forgetting import ForgettingMonitor
from secura_lightning.callbacks.throughput import Throughput
from secura_lightning.cli import fit
from secura_lightning.engine import ShardedStrategy
from secura_lightning.errors import ConfigError

ROOT = Path(__file__).parents[2] / "configs"
OVERLAYS = sorted((ROOT / "overlays").glob("*.yaml"))
NAMES = {path.stem for path in OVERLAYS}
BASES = [
    "quickstart",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("pocket_lora_null", "llama3.1_8b", "gemma2_2b")),
]


def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *names: str) -> tuple[Trainer, Any, Any]:
    """What `secura fit` would have fitted."""
    started: list[Any] = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, data, **_: started.append((self, model, data)))
    files = [part for name in names for part in ("-c", str(ROOT / f"{name}.yaml"))]
    assert fit.main([*files, "--save_dir", str(tmp_path)]) == 0
    return started[0]


def test_the_overlays_are_these_and_say_how_to_run_them() -> None:
    assert sorted(NAMES) == ["bf16", "cpu", "ddp", "fsdp", "gpu", "long_context", "nf4"]
    for path in OVERLAYS:
        text = path.read_text()
        assert text.startswith("# What:"), path.name
        assert f"configs/overlays/{path.name}" in text, path.name
        assert "callbacks" not in yaml.safe_load(text).get("trainer", {}), "a list would replace the configuration's"


def test_the_throughputs_clock_stops_before_anything_evaluates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer, _, _ = build(monkeypatch, tmp_path, "quickstart", "overlays/cpu")
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds.index(Throughput) < kinds.index(ForgettingMonitor)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("overlay", sorted(NAMES - {"gpu"}))
def test_every_overlay_builds_on_any_configuration(
    base: str, overlay: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer, model, data = build(monkeypatch, tmp_path, base, "overlays/cpu", f"overlays/{overlay}")
    wanted = yaml.safe_load((ROOT / "overlays" / f"{overlay}.yaml").read_text())
    for key, value in wanted.get("model", {}).items():
        assert getattr(model, key, None) == value or getattr(model.spec, key) == value
    for key, value in wanted.get("data", {}).items():
        assert getattr(data, key) == value
    if "precision" in wanted.get("trainer", {}):
        assert trainer.precision == wanted["trainer"]["precision"]
    assert isinstance(trainer.strategy, ShardedStrategy) == (overlay == "fsdp")
    if overlay == "ddp":
        assert trainer.strategy._ddp_kwargs["find_unused_parameters"] is False
        assert trainer.strategy._timeout.total_seconds() == 1800
    assert (tmp_path / base).parent == tmp_path  # a run is named after its first file


def test_without_a_gpu_the_gpu_overlay_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No supported gpu backend found") as caught:
        build(monkeypatch, tmp_path, "quickstart", "overlays/gpu")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["cpu", "bf16", "nf4", "long_context"])
def test_what_runs_on_a_cpu_runs(overlay: str, tmp_path: Path) -> None:
    files = [part for name in ("quickstart", f"overlays/{overlay}") for part in ("-c", str(ROOT / f"{name}.yaml"))]
    cut = ["--data.steps_per_task", "1", "--data.batch_size", "2", "--data.probe", "null", "--forgetting.limit", "1"]
    small = ["--model.adapter.c", "8", "--model.adapter.a", "12"]
    assert fit.main([*files, "--save_dir", str(tmp_path), *cut, *small]) == 0
    assert list(tmp_path.glob("quickstart/version_0/checkpoints/last.ckpt"))
