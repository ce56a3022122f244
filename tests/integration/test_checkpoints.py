"""Checkpoints are small, whole, and refused where they do not belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from secura_lightning.cli.checkpoints import rebuild
from secura_lightning.cli.main import main
from secura_lightning.errors import SecuraError
from tests.integration.conftest import TINY, Fit

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
OTHER = {"class_path": "tests.tiny.TinyTask", "init_args": {"name": "first", "seed": 1}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    from tests.integration.conftest import fit_into

    return fit_into(tmp_path_factory.mktemp("finished"))


def test_a_run_leaves_exactly_these_files(finished: Fit) -> None:
    names = {str(path.relative_to(finished.folder)) for path in finished.folder.rglob("*") if path.is_file()}
    names = {name for name in names if not name.startswith(("events.", "predictions/"))}
    kept = {"last.ckpt", "task1-first.ckpt", "task2-second.ckpt", "task3-third.ckpt"}
    assert names == {
        "config.yaml",
        "continual.json",
        "continual.csv",
        "hparams.yaml",
        *(f"checkpoints/{n}" for n in kept),
    }


def test_checkpoint_holds_the_adapter_and_not_the_base(finished: Fit) -> None:
    checkpoint = finished.checkpoint
    assert {key.rsplit(".", 1)[-1] for key in checkpoint["state_dict"]} == {"lora_A", "lora_B"}
    assert sum(value.numel() for value in checkpoint["state_dict"].values()) == 7296
    size = (finished.folder / "checkpoints" / "last.ckpt").stat().st_size
    assert size < 400_000  # the tiny base alone is 5.8 MB


def test_report_has_what_readers_rely_on(finished: Fit) -> None:
    report = finished.report
    assert report["tasks"] == ["first", "second", "third"]
    assert [len(row) for row in report["matrix"]] == [3] * 4
    keys = {"AP", "AIA", "BWT", "BWT_trace", "forgetting", "FWT", "learning_accuracy", "base_retention", "base_delta"}
    assert set(report["metrics"]) == keys
    assert len(report["base_knowledge"]["perplexity"]) == 4
    assert {"seed", "adapter", "strategy", "trainable_parameters", "versions"} <= set(report["meta"])
    assert report["meta"]["strategy"] == "SEQ"
    assert report["steps"] == [0, 6, 9, 14]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.adapter.init_args.rank": 4}, "model.adapter.rank=2"),
        ({"model.adapter": {"class_path": "FullConfig"}}, "model.adapter.class=LoRAConfig"),
        ({"model.dtype": "float64"}, "model.dtype=float32"),
        ({"seed_everything": 8}, "other base weights"),
        ({"data.batch_size": 2}, "window=4"),
        ({"model.optimizer.init_args.lr": 0.5}, r"model\.optimizer\.lr=0\.01, this configuration has 0\.5"),
        ({"model.optimizer": SGD}, r"model\.optimizer\.class=AdamW"),
        ({"model.schedule.kind": "linear"}, r"model\.schedule\.kind=cosine"),
        ({"data.tasks": [OTHER, *TINY["data"]["tasks"][1:]]}, "written on other training rows of first "),
        ({"data.steps_per_task": [6, 3, 6]}, "steps_per_task"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    finished: Fit, run_fit: Callable[..., Fit], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SecuraError, match=message):
        run_fit(changes, ("--ckpt_path", str(finished.folder / "checkpoints" / "last.ckpt")))


def test_a_runs_configuration_stays_the_one_that_it_began_with(run_fit: Callable[..., Fit]) -> None:
    run = run_fit()
    config, last = run.folder / "config.yaml", run.folder / "checkpoints" / "last.ckpt"
    before = config.read_text()
    with pytest.raises(SecuraError, match=r"model\.adapter\.rank=2"):  # refused
        run_fit({"model.adapter.init_args.rank": 4}, ("--ckpt_path", str(last)))
    run_fit(None, ("--ckpt_path", str(last)))  # the same
    assert config.read_text() == before
    assert not (run.folder / "config.resumed.yaml").exists()
    run_fit({"data.batch_size": 2, "trainer.accumulate_grad_batches": 2}, ("--ckpt_path", str(last)))
    assert config.read_text() == before
    assert yaml.safe_load((run.folder / "config.resumed.yaml").read_text())["data"]["batch_size"] == 2


def test_truncated_or_foreign_checkpoint_is_refused(finished: Fit, run_fit: Callable[..., Fit], tmp_path: Path) -> None:
    data = (finished.folder / "checkpoints" / "last.ckpt").read_bytes()
    cut, foreign = tmp_path / "cut.ckpt", tmp_path / "foreign.ckpt"
    cut.write_bytes(data[: len(data) // 2])
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(SecuraError, match="damaged or no checkpoint"):
        run_fit(None, ("--ckpt_path", str(cut)))
    with pytest.raises(SecuraError, match="not written by secura fit"):
        run_fit(None, ("--ckpt_path", str(foreign)))


def test_merged_folder_computes_what_the_adapted_model_does(finished: Fit, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = finished.folder / "checkpoints" / "last.ckpt"
    assert main(["merge", "--ckpt", str(path), "--out", str(tmp_path / "merged")]) == 0
    _, model, adapters = rebuild(path)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "merged")("first 5: red dog")["input_ids"]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    with adapters.disabled():
        assert not torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-3)
    assert main(["merge", "--ckpt", str(path), "--out", str(tmp_path / "merged")]) == 1


@pytest.mark.slow
def test_eval_of_the_last_checkpoint_gives_the_last_line(finished: Fit, tmp_path: Path) -> None:
    config, last = finished.folder / "config.yaml", finished.folder / "checkpoints" / "last.ckpt"
    assert main(["eval", "--config", str(config), "--ckpt", str(last), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    names = finished.report["tasks"]
    assert [found["tasks"][name]["value"] for name in names] == finished.report["matrix"][-1]
    assert found["base_knowledge"]["perplexity"] == finished.report["base_knowledge"]["perplexity"][-1]


def test_a_task_may_be_called_what_it_likes(run_fit: Callable[..., Fit]) -> None:
    odd = {"class_path": "tests.tiny.TinyTask", "init_args": {"name": "math/easy: ä", "rows": 8}}
    run = run_fit({"data.tasks": [odd], "data.steps_per_task": [2], "forgetting.limit": 2})
    assert run.report["tasks"] == ["math/easy: ä"]
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["last.ckpt", "task1-math%2Feasy%3A %C3%A4.ckpt"]


@pytest.mark.slow
def test_eval_scores_the_part_of_the_probe_that_no_guard_watches(run_fit: Callable[..., Fit], tmp_path: Path) -> None:
    guard = {"class_path": "RetentionGuard", "init_args": {"floor": 0.01, "every_n_steps": 2}}
    run = run_fit({"trainer.callbacks": [guard], "data.steps_per_task": 2})
    config, last = run.folder / "config.yaml", run.folder / "checkpoints" / "last.ckpt"
    assert main(["eval", "--config", str(config), "--ckpt", str(last), "--out", str(tmp_path)]) == 0
    found, told = json.loads((tmp_path / "eval.json").read_text())["base_knowledge"], run.report["base_knowledge"]
    assert (found["part"], told["part"]) == ("held-out", "held-out")
    assert found["accuracy"] == told["accuracy"][-1]
    assert found["n"] == 4


def test_card_holds_the_results_up_to_its_checkpoint(finished: Fit, tmp_path: Path) -> None:
    path = finished.folder / "checkpoints" / "task1-first.ckpt"
    assert main(["merge", "--ckpt", str(path), "--out", str(tmp_path / "merged")]) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "\n1 first " in card
    assert "\n2 second " not in card
    assert "lr: 0.01" in card
