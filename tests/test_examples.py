"""The example scripts run to the end, learn, and give the model that they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    path = next(path for path in EXAMPLES if path.stem == name)
    spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    assert [path.stem for path in EXAMPLES] == ["hf_trainer", "plain_loop"]


def test_plain_loop_learns_and_merges_what_it_learned() -> None:
    before, after, merged = load("plain_loop").main(["--steps", "6"])
    assert after < 0.9 * before
    assert merged == pytest.approx(after, rel=1e-4)


@pytest.mark.slow
def test_trainer_learns_and_the_saved_adapter_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = load("hf_trainer").main(["--steps", "12", "--out", str(tmp_path / "adapter")])
    assert last < 0.8 * first
    told = capsys.readouterr().out.splitlines()[-1]
    assert float(told.split("loaded again: ")[1].split()[0]) < 1e-5
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"adapter.json", "adapter.safetensors"}
