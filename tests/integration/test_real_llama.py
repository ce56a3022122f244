"""SECURA on a really pretrained Llama over real rows, from local files to the end.

The model and the rows are no part of the project: they lie beside the checkout, in ``shared/``, and the test skips
without them. Run it with ``pytest -m slow -s tests/integration/test_real_llama.py``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from secura_lightning.cli import fit

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
TASKS = ["gsm8k", "FOMC", "ScienceQA", "agnews"]
STEPS = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SHARED / "models" / "stories260k" / "config.json").is_file() or not (SHARED / "data").is_dir(),
        reason=f"no real model and rows under {SHARED}",
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run of configs/stories260k.yaml, shortened."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SHARED)  # the configuration's paths are relative
        args = ["--config", str(ROOT / "configs" / "stories260k.yaml"), "--save_dir", str(out)]
        args += ["--data.steps_per_task", str(STEPS), "--forgetting.limit", "32"]
        fit.main([*args, "--trainer.enable_progress_bar", "false"])  # prints the table
    return out / "stories260k" / "version_0"


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, Any]:
    return json.loads((run / "continual.json").read_text())


def test_every_score_is_there_and_finite(found: dict[str, Any]) -> None:
    assert found["tasks"] == TASKS
    assert found["steps"] == [STEPS * after for after in range(len(TASKS) + 1)]
    assert len(found["matrix"]) == len(TASKS) + 1
    assert all(0 <= cell <= 1 for row in found["matrix"] for cell in row)
    assert all(found["metrics"][name] is not None for name in ("AP", "AIA", "BWT", "forgetting", "FWT"))
    for row in found["details"]:
        assert [row[task]["n"] for task in TASKS] == [32] * 4
        assert row["gsm8k"]["metric"] == "numeric"
        assert row["FOMC"]["chance"] == pytest.approx(1 / 3)
        assert row["agnews"]["chance"] == pytest.approx(1 / 4)
    assert found["meta"]["adapter"]["class"] == "SECURAConfig"


def test_base_knowledge_is_the_perplexity_of_held_out_stories(found: dict[str, Any]) -> None:
    base = found["base_knowledge"]
    assert base["perplexity"][0] == pytest.approx(5.2, rel=0.05)  # as published beside the model
    assert all(math.isfinite(value) and 4.9 < value < 30 for value in base["perplexity"])
    assert base["accuracy"] == [None] * 5
    assert base["kinds"] == {}
    assert (base["n"], base["chance"]) == (0, None)
    assert base["tokens"] > 600


def test_every_task_is_learned(run: Path) -> None:
    events = EventAccumulator(str(run))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) == STEPS * len(TASKS)
    for i, task in enumerate(TASKS):
        mine = losses[i * STEPS : (i + 1) * STEPS]
        assert sum(mine[-5:]) < 0.85 * sum(mine[:5]), task
