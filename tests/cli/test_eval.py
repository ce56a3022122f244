"""`secura eval` scores any model on any configuration as `fit` would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from secura_lightning.cli.main import main
from secura_lightning.evaluation.harness import run_lm_eval
from tests.cli.checkpoints import EVERY, adapted, base_folder, checkpoint
from tests.evaluation.tiny import byte_tokenizer

DATA = {
    "tasks": [{"class_path": "tests.tiny.TinyTask", "init_args": {"name": "first"}}],
    "probe": "tests.tiny.TinyProbe",
    "batch_size": 4,
    "max_length": 64,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"base": str(base)}, "data": DATA, "seed_everything": 1}))
    return path


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval.json").read_text())


def test_checkpoint_and_merged_folder_score_alike_and_the_base_does_not(
    base: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-none"], size=0.2)
    assert main(["merge", "--ckpt", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    found = {}
    for name, of in {"ckpt": ["--ckpt", "last.ckpt"], "merged": ["--model", "merged"], "base": []}.items():
        where = [of[0], str(tmp_path / of[1])] if of else []
        out = tmp_path / f"out-{name}"
        assert main(["eval", "--config", str(config), *where, "--out", str(out), "--forgetting.limit", "4"]) == 0
        found[name] = result(out)
    told = capsys.readouterr().out
    assert "95 % from" in told
    assert "base/choice" in told
    assert "perplexity" in told
    values = {name: content["base_knowledge"]["perplexity"] for name, content in found.items()}
    assert values["ckpt"] == pytest.approx(values["merged"], rel=1e-4)
    assert abs(values["ckpt"] - values["base"]) > 0.01 * values["base"]
    assert found["ckpt"]["tasks"]["first"]["n"] == 4
    lines = (tmp_path / "out-ckpt" / "predictions" / "row0_first.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert {"id", "reference", "prediction", "score"} <= set(json.loads(lines[0]))


def write_local_task(folder: Path) -> None:
    """A multiple-choice task of lm-eval over a local file."""
    folder.mkdir()
    rows = [{"question": f"{i} plus 1 is", "choices": [str(i), str(i + 1)], "answer": 1} for i in range(6)]
    (folder / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "secura_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "secura_local.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.slow
def test_lm_eval_scores_the_live_and_the_merged_model_alike(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    write_local_task(tmp_path / "tasks")
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-none"], size=0.2)
    assert main(["merge", "--ckpt", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "merged")]) == 0
    common = ["--lm-eval", "secura_local", "--lm-eval-include", str(tmp_path / "tasks"), "--limit", "5"]
    for name, where in {"live": ["--ckpt", "last.ckpt"], "plain": ["--model", "merged"]}.items():
        arguments = [where[0], str(tmp_path / where[1]), "--out", str(tmp_path / name)]
        assert main(["eval", *arguments, *common]) == 0
    live, plain = (result(tmp_path / name)["lm_eval"]["secura_local"] for name in ("live", "plain"))
    assert live["acc,none"] == plain["acc,none"]
    assert 0 <= live["acc,none"] <= 1
    assert main(["eval", "--model", str(base), "--lm-eval", "secura_locl", *common[2:]]) == 2


def test_without_lm_eval_the_extra_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "--model", str(base), "--lm-eval", "arc_easy"]) == 1
    assert "pip install 'secura_lightning[eval]'" in capsys.readouterr().err


def test_lm_eval_is_called_through_its_python_api(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the package: names, limit and results pass through."""
    import sys
    from types import ModuleType

    seen: dict[str, Any] = {}

    class Tasks:
        def __init__(self, include_path: str | None) -> None:
            self.all_tasks = ["arc_easy"]

    def simple_evaluate(model: Any, **settings: Any) -> dict[str, Any]:
        seen.update(settings)
        return {"results": {"arc_easy": {"acc,none": 0.5, "alias": "arc_easy", "dropped": [1]}}}

    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    sys.modules["lm_eval.models.huggingface"].HFLM = lambda **given: given  # type: ignore[attr-defined]
    sys.modules["lm_eval.tasks"].TaskManager = Tasks  # type: ignore[attr-defined]
    model, _ = adapted(base, EVERY["LoRA-none"])
    found = run_lm_eval(model, byte_tokenizer(), "arc_easy", limit=7)
    assert found == {"arc_easy": {"acc,none": 0.5, "alias": "arc_easy"}}
    assert (seen["tasks"], seen["limit"]) == (["arc_easy"], 7)


def test_two_configurations_of_one_base_have_folders_of_their_own(
    base: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = config.with_name("other.yaml")
    other.write_text(config.read_text().replace("name: first", "name: second"))
    for file in (config, other):
        assert main(["eval", "--config", str(file), "--forgetting.limit", "2"]) == 0
    folder = Path("evaluations")
    for name, task in (("config", "first"), ("other", "second")):
        assert list(result(folder / name / base.name)["tasks"]) == [task]
        found = {path.name for path in (folder / name / base.name / "predictions").glob("row*")}
        assert found == {f"row0_{task}.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--config: give the configuration"),
        (["--config", "{c}", "--ckpt", "a.ckpt", "--model", "b"], 2, "--ckpt and --model are both given"),
        (["--config", "{c}", "--ckpt", "absent.ckpt"], 1, "--ckpt: no file absent.ckpt"),
        (["--config", "{c}", "--model", "./absent"], 1, "no folder ./absent"),
        (["--config", "{c}", "--weights", "working"], 2, "give --ckpt"),
        (["--config", "{c}", "--limit", "3"], 2, "go with --lm-eval"),
        (["--config", "{c}", "--data.bach_size", "3"], 2, "no key 'data.bach_size'"),
        (["--config", "absent.yaml"], 2, "absent.yaml"),
        (["--config", "{c}", "--out", "{c}"], 1, "config.yaml is a file; give a folder"),
        (["--config", "{c}", "--out", "{c}/a/b"], 1, "config.yaml is a file; give a folder"),
        (["--model", "x", "--lm-eval", "arc", "--limit", "0"], 2, "--limit is 0"),
        (["--model", "x", "--lm-eval", "arc", "--unknown", "0"], 2, "no option --unknown"),
    ],
)
def test_bad_input_is_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["eval", *(argument.replace("{c}", str(config)) for argument in arguments)]) == code
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("secura eval: ")]
    assert len(told) == 1
    assert message in told[0]
