"""`secura dial` finds the largest scale that keeps the floor, and writes an adapter that can be merged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secura_lightning.cli import dial
from secura_lightning.cli.checkpoints import rebuild
from secura_lightning.cli.dial_report import draw, table
from secura_lightning.cli.main import main
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.evaluation.evaluate import ProbeScore
from tests.integration.conftest import Fit, fit_into


class Path1:
    """A path whose scale is all that there is to see."""

    def __init__(self) -> None:
        from contextlib import nullcontext

        self.scale = 0.0
        self.adapters = SimpleNamespace(disabled=lambda: nullcontext())

    def go(self, scale: float) -> None:
        self.scale = scale


class Scores:
    """Retention falls with the square of the scale, the task's score rises with it."""

    def __init__(self, path: Path1) -> None:
        self.path = path

    def tasks(self) -> dict[str, float]:
        return {"one": self.path.scale, "two": 0.5}

    def probe(self) -> ProbeScore:
        kept = 1 - self.path.scale**2
        return ProbeScore("p", {"kind": kept}, kept, 2.0, 1, 1, None)


@pytest.mark.parametrize(("floor", "scale"), [(0.75, 0.5), (0.9, 0.1**0.5), (1.0, 0.0), (0.0001, 0.99995)])
def test_largest_scale_that_keeps_the_floor(floor: float, scale: float) -> None:
    path: Any = Path1()
    result = dial.sweep(path, Scores(path), floor, 11)  # type: ignore[arg-type]
    assert scale - 0.1 / 2**5 <= result["chosen"]["scale"] <= scale
    assert result["kept"]
    assert [point["scale"] for point in result["points"]] == pytest.approx([i / 10 for i in range(11)])
    assert result["chosen"]["mean"] == pytest.approx((result["chosen"]["scale"] + 0.5) / 2)
    lines = table(result).splitlines()
    assert sum(line.endswith("<") for line in lines) == 1
    assert f"{result['chosen']['scale']:.4f}" in lines[-1]


def test_picture_is_written(tmp_path: Path) -> None:
    path: Any = Path1()
    draw(dial.sweep(path, Scores(path), 0.9, 3), tmp_path / "dial.png")  # type: ignore[arg-type]
    assert (tmp_path / "dial.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retention", "1.5"], "--retention is 1.5"),
        (["--points", "1"], "--points is 1"),
        (["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dial.main(["--ckpt", "nowhere", *arguments])


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecuraError, match="--ckpt: no checkpoint at"):
        dial.main(["--ckpt", str(tmp_path)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    changes = {
        "model.init": "pretrained",
        "model.adapter.init_args.dropout": 0.0,
        "data.steps_per_task": [2, 2, 2],
        "data.probe": "PocketProbe",
        "forgetting.limit": 4,
    }
    return fit_into(tmp_path_factory.mktemp("finished"), changes)


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, "task1-first.ckpt"])
def test_sweeps_a_real_run_and_writes_a_mergeable_adapter(finished: Fit, tmp_path: Path, start: str | None) -> None:
    more = [] if start is None else ["--start", str(finished.folder / "checkpoints" / start)]
    out = tmp_path / "dialled"
    arguments = [
        "--ckpt",
        str(finished.folder),
        "--retention",
        "0.5",
        "--points",
        "3",
        "--out",
        str(out),
        "--limit",
        "4",
    ]
    assert main(["dial", *arguments, *more]) == 0
    assert {path.name for path in out.iterdir()} == {"dial.png", "dial.json", "dialled.ckpt"}
    result = json.loads((out / "dial.json").read_text())
    scale = result["chosen"]["scale"]
    _, _, adapters = rebuild(out / "dialled.ckpt")
    last = finished.checkpoint["state_dict"]
    if start is None:
        for name, value in adapters.state_dict().items():
            torch.testing.assert_close(value, last[name] * (scale if name.endswith("lora_B") else 1))
    assert main(["merge", "--ckpt", str(out / "dialled.ckpt"), "--out", str(tmp_path / "merged")]) == 0


def test_scores_are_taken_as_the_run_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def score(model: Any, tokenizer: Any, what: Any, *rest: Any) -> Any:
        seen.append(rest)
        return SimpleNamespace(task="one", value=0.5)

    monkeypatch.setattr(dial, "evaluate_task", score)
    monkeypatch.setattr(dial, "evaluate_probe", score)
    data: Any = SimpleNamespace(tasks=["task"], probe="probe")
    scorer = dial._Scorer(None, None, data, dial.Scoring("validation", 5, 7, True))
    assert scorer.tasks() == {"one": 0.5}
    scorer.probe()
    assert seen == [("validation", 5, 7, True), (5, 7, True)]


@pytest.mark.slow
def test_the_end_of_the_path_scores_as_the_run_did(tmp_path: Path) -> None:
    changes = {
        "model.init": "pretrained",
        "trainer.precision": "bf16-mixed",
        "data.tasks": ["PocketLogic", "PocketDigest"],
        "data.steps_per_task": [3, 3],
        "data.probe": "PocketProbe",
        "data.max_length": 128,
        "forgetting.limit": 16,
        "forgetting.normalise": True,
    }
    run = fit_into(tmp_path, changes)
    assert main(["dial", "--ckpt", str(run.folder), "--points", "2", "--out", str(tmp_path / "dial")]) == 0
    end = json.loads((tmp_path / "dial" / "dial.json").read_text())["points"][-1]
    assert list(end["tasks"].values()) == run.report["matrix"][-1]
    assert end["kinds"] == {kind: column[-1] for kind, column in run.report["base_knowledge"]["kinds"].items()}
    assert end["perplexity"] == pytest.approx(run.report["base_knowledge"]["perplexity"][-1], rel=1e-6)
