"""Configurations that need a download, or data of the user's, are accepted by the command line down to every key.

Those of the embedded model are fitted in tests/integration/test_configs.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from secura_lightning.cli import fit
from secura_lightning.data.benchmark import BenchmarkTask
from secura_lightning.errors import ConfigError
from secura_lightning.metrics.text import METRICS
from secura_lightning.study.grid import Cell, read_sweep

CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    if not path.stem.startswith(("pocket", "quickstart"))
]
STUDIES = Path(__file__).parents[2] / "configs" / "study"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_accepted(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[Any, Any]] = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, data, **options: started.append((model, data)))
    assert fit.main(["--config", str(config), "--save_dir", str(tmp_path)]) == 0
    ((model, data),) = started
    assert f"configs/{config.name}" in config.read_text()  # the header says how to run it
    for task in data.tasks:
        assert task.metric in METRICS or task.is_text
        if isinstance(task, BenchmarkTask) and task.path is None:
            assert len(task.dataset.revision) == 40  # type: ignore[union-attr]
    if model.spec.base.count("/") == 1 and not model.spec.base.startswith("models/"):
        assert len(model.spec.revision) == 40
    if config.stem.startswith(("gemma", "llama", "qwen")):
        assert [task.name for task in data.tasks] == ["gsm8k", "cnn_dailymail", "news_de", "logiqa"]


def variants(path: Path) -> list[Cell]:
    """Cells of a sweep file in which every variant of every axis occurs."""
    sweep = read_sweep(path)
    seen: set[tuple[str, str]] = set()
    cells = []
    for cell in [*sweep.search(), *sweep.cells({})] if sweep.select else sweep.cells():
        new = {(name, str(cell.values[name])) for name in cell.values if sweep.axes[name].variants} - seen
        seen |= new
        if new:
            cells.append(cell)
    return cells


@pytest.mark.slow
@pytest.mark.parametrize("study", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_variant_of_a_study_is_accepted(study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[str] = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, data, **options: started.append(type(model).__name__))
    cells = variants(study)
    for cell in cells:
        path = tmp_path / "cell.yaml"
        path.write_text(yaml.safe_dump(cell.settings))
        assert fit.main(["--config", str(path), "--save_dir", str(tmp_path)]) == 0, cell.id
    assert len(started) == len(cells) >= 3


def test_orders_of_the_standard_benchmark_are_the_published_ones() -> None:
    orders = {}
    for path in CONFIGS:
        if path.stem.startswith("standard_cl_order"):
            tasks = yaml.safe_load(path.read_text())["data"]["tasks"]
            orders[int(path.stem[-1])] = [task["init_args"]["dataset"] for task in tasks]
    # Wang et al., arXiv 2310.14152, appendix
    assert orders[1] == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert orders[2] == ["dbpedia", "amazon", "agnews", "yahoo"]
    assert orders[3] == ["yahoo", "amazon", "agnews", "dbpedia"]
    assert " ".join(orders[4]) == (
        "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo"
    )
    assert orders[5][:5] == ["MultiRC", "BoolQA", "WiC", "MNLI", "CB"]
    assert orders[5][-5:] == ["dbpedia", "agnews", "yelp", "amazon", "yahoo"]
    assert orders[6][:4] == ["yelp", "amazon", "MNLI", "CB"]
    assert orders[6][-3:] == ["MultiRC", "BoolQA", "WiC"]
    assert set(orders[4]) == set(orders[5]) == set(orders[6])
    assert all(len(set(orders[n])) == 15 for n in (4, 5, 6))


TABLE = """
data:
  tasks:
    - class_path: TableTask
      init_args:
        name: arc
        template: "{question}\\n{lettered_choices}\\nAnswer:"
        answer: answerKey
        answer_is: letter
        choices: choices.text
        hub_id: allenai/ai2_arc
        hub_config: ARC-Easy
        splits: {train: train, test: test}
        n_train: 100
    - class_path: NewsDE
      init_args: {path: news.tsv, columns: [de, en], direction: de-en, separator: "\\n"}
  probe: {class_path: TextProbe, init_args: {path: held_out.txt, documents: blocks}}
"""


def test_a_table_becomes_a_task_through_yaml_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[Any] = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, data, **options: started.append(data))
    (tmp_path / "c.yaml").write_text(TABLE)
    fit.main(["--config", str(tmp_path / "c.yaml"), "--save_dir", str(tmp_path)])
    arc, news = started[0].tasks
    assert arc.template.text == "{question}\n{lettered_choices}\nAnswer:"
    assert (arc.dataset.id, arc.dataset.config, arc.dataset.splits) == (
        "allenai/ai2_arc",
        "ARC-Easy",
        {"train": "train", "test": "test"},
    )
    assert (news.columns, news.separator, news.languages) == (["de", "en"], "\n", ["de", "en"])
    assert started[0].probe.documents == "blocks"


def test_wrong_key_of_a_task_gets_one_line(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data: {tasks: [{class_path: GSM8K, init_args: {n_trian: 5}}]}")
    with pytest.raises(ConfigError, match=r"no setting 'n_trian'; did you mean 'n_train'\?") as caught:
        fit.main(["--config", str(config)])
    assert "\n" not in str(caught.value)
