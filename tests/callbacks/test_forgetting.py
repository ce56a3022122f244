"""The monitor inside a real ``trainer.fit``, over a model whose every answer is known beforehand.

Task i asks questions that end in its own sign. The module learns the right answer to that sign at the task's end, and
forgets part of what came before, so that the whole matrix can be written down by hand.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from secura_lightning.adapters import FullConfig, LoRAConfig, describe_adapter
from secura_lightning.callbacks import report
from secura_lightning.callbacks.forgetting import ForgettingMonitor
from secura_lightning.callbacks.tasks import TaskEnd, TaskStart
from secura_lightning.callbacks.tensorboard import draw_matrix
from secura_lightning.data.batches import SequencePlan
from secura_lightning.data.rows import Row
from secura_lightning.errors import ConfigError
from secura_lightning.metrics.text import METRICS
from secura_lightning.strategies.base import Strategy
from tests.evaluation.tiny import ListProbe, ListTask, byte_tokenizer, chain_llama

SIGNS = "!?;"
STEPS = [2, 3, 2]
# After each task, what the model answers to ! ? ; and, for the probe, to : (None: nothing)
ANSWERS = [(None, "b", None, "k"), ("a", "b", None, "k"), ("x", "b", None, "k"), ("x", "b", "c", None)]
MATRIX = [[0, 1, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1]]
BASE = [1.0, 1.0, 1.0, 0.5]  # the second kind of the probe is never forgotten


def answer_with(model: torch.nn.Module, answers: tuple[str | None, ...]) -> None:
    """Make the chain model follow each sign with its answer."""
    rules = {sign: answer for sign, answer in zip(f"{SIGNS}:", answers, strict=True) if answer}
    model.load_state_dict(chain_llama({**rules, "=": " ", " ": "2"}).state_dict())


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = chain_llama({})
        self.tokenizer = byte_tokenizer()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        answer_with(self.model, ANSWERS[0])
        self.modes: list[bool] = []

    def describe(self) -> dict[str, Any]:
        adapter = describe_adapter(LoRAConfig(rank=2, norm="row"))
        return {"seed": 3, "adapter": adapter, "base": {"base": "chain"}, "trainable_parameters": 1}

    def configure_callbacks(self) -> list[Any]:
        return [TaskStart(), TaskEnd()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.unused], lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.modes.append(self.model.training)
        return self.unused.sum()

    def on_train_start(self) -> None:
        self.model.train()

    def on_task_start(self, index: int) -> None: ...

    def on_step_end(self) -> None: ...

    def on_task_end(self, index: int) -> None:
        answer_with(self.model, ANSWERS[index + 1])


class Data(LightningDataModule):
    def __init__(self, steps: list[int] = STEPS, accumulate: int = 1, probe: bool = True) -> None:
        super().__init__()
        self.plan = SequencePlan(steps, accumulate)
        self.tasks = [
            ListTask(f"task {sign}", [Row(f"{i}", f"{i}{sign}", wanted) for i in range(4)])
            for sign, wanted in zip(SIGNS, "abc", strict=True)
        ]
        facts = [Row("0", "1:", "k", kind="first"), Row("1", "1+1=", "2", ("1", "2"), kind="second")]
        self.probe = ListProbe(facts, ["1+1=2"]) if probe else None

    def describe(self) -> dict[str, Any]:
        return {"steps_per_task": self.plan.steps, "tasks": ["a", "b", "c"], "batch_size": 4}

    def train_dataloader(self) -> list[int]:
        return list(range(len(self.plan)))


def fit(
    folder: Path,
    monitor: ForgettingMonitor,
    data: Data | None = None,
    logger: Logger | list[Logger] | None = None,
    module: Module | None = None,
    **options: Any,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger or TensorBoardLogger(str(folder), "run", default_hp_metric=False),
        callbacks=[monitor, *options.pop("callbacks", [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module or Module(), data or Data())
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Module, str]:
    """One finished run: its folder, its module, and what it printed."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer = fit(tmp_path_factory.mktemp("run"), ForgettingMonitor(every_n_steps=1, every_limit=2, samples=1))
    assert trainer.log_dir is not None
    return Path(trainer.log_dir), trainer.lightning_module, printed.getvalue()


def load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "continual.json").read_text())


def test_report_holds_the_matrix_the_base_and_the_metrics(run: tuple[Path, Module, str]) -> None:
    found = load(run[0])
    assert found["tasks"] == ["task !", "task ?", "task ;"]
    assert found["matrix"] == MATRIX
    assert found["steps"] == [0, 2, 5, 7]
    base = found["base_knowledge"]
    assert base["accuracy"] == BASE
    assert base["kinds"] == {"first": [1.0, 1.0, 1.0, 0.0], "second": [1.0] * 4}
    assert len(base["perplexity"]) == 4
    assert base["chance"] == 0.25
    assert found["metrics"] == {
        "AP": pytest.approx(2 / 3),
        "AIA": pytest.approx((1 + 1 / 2 + 2 / 3) / 3),
        "BWT": -0.5,  # task 1 is lost, task 2 kept
        "BWT_trace": pytest.approx(-1 / 3),
        "forgetting": 0.5,
        "FWT": 0.0,
        "learning_accuracy": 1.0,
        "base_retention": 0.5,
        "base_delta": -0.5,
    }
    assert found["details"][3]["task ;"] == {
        "metric": "exact", "value": 1.0, "n": 4, "interval": [1.0, 1.0], "chance": None, "majority": None,
    }  # fmt: skip


def test_meta_says_what_ran(run: tuple[Path, Module, str]) -> None:
    meta = load(run[0])["meta"]
    assert meta["seed"] == 3
    assert meta["adapter"] == describe_adapter(LoRAConfig(rank=2, norm="row"))
    assert meta["trainable_parameters"] == 1
    assert meta["strategy"] == "SEQ"
    assert meta["data"] == {"steps_per_task": STEPS, "tasks": ["a", "b", "c"], "batch_size": 4}
    assert set(meta["versions"]) == {"secura_lightning", "torch", "lightning", "transformers"}
    assert (
        meta["versions"]["torch"] == torch.__version__.split("+")[0] or meta["versions"]["torch"] == torch.__version__
    )
    assert 0 < meta["wall_time"] < 300


def test_csv_says_the_same(run: tuple[Path, Module, str]) -> None:
    with (run[0] / "continual.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [
        "after", "step", "task !", "task ?", "task ;", "base/first", "base/second", "base/accuracy", "base/perplexity",
    ]  # fmt: skip
    assert [line[0] for line in lines] == ["base", "task !", "task ?", "task ;"]
    assert [[float(cell) for cell in line[2:5]] for line in lines] == MATRIX
    assert [float(line[7]) for line in lines] == BASE


def test_scores_can_be_recomputed_from_saved_predictions(run: tuple[Path, Module, str]) -> None:
    for t, cells in enumerate(MATRIX):
        for sign, value in zip(SIGNS, cells, strict=True):
            path = report.predictions_path(run[0], t, f"task {sign}")
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert [row["id"] for row in rows] == ["0", "1", "2", "3"]
            assert np.mean([METRICS["exact"](row["prediction"], row["reference"]) for row in rows]) == value
        kinds = [json.loads(line)["kind"] for line in report.predictions_path(run[0], t, None).read_text().splitlines()]
        assert kinds == ["first", "second"]
    assert len(list((run[0] / "predictions").iterdir())) == 16


def test_table_is_printed(run: tuple[Path, Module, str]) -> None:
    lines = [line.split() for line in run[2].strip().splitlines()]
    assert lines[0] == ["after", "task", "!", "task", "?", "task", ";", "base", "ppl"]
    assert lines[2][:5] == ["(base)", "0.000", "1.000", "0.000", "1.000"]
    assert lines[5][:7] == ["3", "task", ";", "0.000", "1.000", "1.000", "0.500"]
    assert "BWT -0.500" in run[2]
    assert "base_retention 0.500" in run[2]
    assert run[2].endswith(f"\nwrote {run[0]}\n\n")


def test_training_goes_on_in_training_mode(run: tuple[Path, Module, str]) -> None:
    assert run[1].modes == [True] * sum(STEPS)


@pytest.fixture(scope="module")
def events(run: tuple[Path, Module, str]) -> EventAccumulator:
    found = EventAccumulator(str(run[0]), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    found.Reload()
    return found


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


def test_curves_run_over_the_global_step(events: EventAccumulator) -> None:
    # every step on a subset, a task's last step in full, once
    assert curve(events, "task/task !") == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1, 5: 0, 6: 0, 7: 0}
    assert len(events.Scalars("task/task !")) == 8
    assert curve(events, "base/first") == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 0}
    assert set(curve(events, "base/perplexity")) == set(range(8))
    assert curve(events, "continual/BWT") == {5: -1, 7: -0.5}


def charts_of(events: EventAccumulator) -> dict[str, dict[str, list[str]]]:
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    return {part.title: {chart.title: list(chart.multiline.tag) for chart in part.chart} for part in layout.category}


def test_all_tasks_share_one_chart(events: EventAccumulator) -> None:
    one, several = charts_of(events).values()
    logged = set(events.Tags()["scalars"])

    def shown(patterns: list[str]) -> set[str]:
        return {tag for tag in logged for pattern in patterns if re.match(pattern, tag)}

    assert shown(one["score on every task"]) == {"task/task !", "task/task ?", "task/task ;"}
    assert shown(one["base knowledge, by kind"]) == {"base/first", "base/second", "base/accuracy"}
    assert [shown(tags) for tags in several.values()] == [
        {"continual/AP"}, {"continual/learning_accuracy"}, {"continual/forgetting"}, {"continual/base_retention"},
        {"base/perplexity"},
    ]  # fmt: skip


def test_without_a_probe_there_are_no_charts_of_one(tmp_path: Path) -> None:
    trainer = fit(tmp_path, ForgettingMonitor(), Data(probe=False))
    events = EventAccumulator(str(trainer.log_dir))
    events.Reload()
    assert not [chart for charts in charts_of(events).values() for chart in charts if "base" in chart]


def test_matrix_is_drawn_and_generations_are_shown(events: EventAccumulator) -> None:
    assert [image.step for image in events.Images("matrix")] == [0, 2, 5, 7]
    texts = events.Tensors("samples/task !")
    shown = [event.tensor_proto.string_val[0].decode() for event in texts]
    assert len(shown) == 4
    assert all(part in shown[1] for part in ("    0!", "    a", "score 1.00"))


def hparams_of(events: EventAccumulator, tag: str) -> Any:
    return plugin_data_pb2.HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)


def test_hparams_hold_what_tells_runs_apart(events: EventAccumulator) -> None:
    cells = hparams_of(events, "_hparams_/session_start_info").session_start_info.hparams
    texts = {name: cell.string_value for name, cell in cells.items() if cell.string_value}
    assert texts == {
        "adapter": "LoRA", "norm": "row", "strategy": "SEQ", "adapter settings": "rank 2, norm row", "base": "chain",
        "split": "test", "tasks": "a, b, c",
    }  # fmt: skip
    numbers = {name: cell.number_value for name, cell in cells.items() if cell.HasField("number_value")}
    assert numbers == {
        "lr": 0.1, "rank": 2, "seed": 3, "batch size": 4, "steps": 7, "trained (millions)": 1e-6, "weight decay": 0,
    }  # fmt: skip
    assert hparams_of(events, "_hparams_/session_end_info").session_end_info.status == api_pb2.STATUS_SUCCESS


def test_hparams_judge_by_curves_that_the_run_has(events: EventAccumulator) -> None:
    named = hparams_of(events, "_hparams_/experiment").experiment.metric_infos
    assert {info.name.tag for info in named} <= set(events.Tags()["scalars"])
    assert [info.display_name for info in named][:4] == ["AP", "learning accuracy", "forgetting", "base retention"]


def test_runs_of_any_adapter_name_the_same_columns(tmp_path: Path) -> None:
    """TensorBoard takes the columns from one run alone, whichever it meets first."""

    class Dense(Module):
        def describe(self) -> dict[str, Any]:
            return {**super().describe(), "adapter": describe_adapter(FullConfig())}

    named, cells = [], []
    for module in (Module(), Dense()):
        trainer = fit(tmp_path, ForgettingMonitor(), Data(probe=False), module=module, max_steps=1)
        events = EventAccumulator(str(trainer.log_dir))
        events.Reload()
        experiment = hparams_of(events, "_hparams_/experiment").experiment
        named.append([(info.name, info.differs) for info in experiment.hparam_infos])
        cells.append(hparams_of(events, "_hparams_/session_start_info").session_start_info.hparams)
    assert named[0] == named[1]
    assert [name for name, first in named[0] if first] == ["adapter", "lr", "norm", "rank", "strategy"]
    assert "rank" in cells[0]
    assert "rank" not in cells[1]


def test_drawing_marks_missing_cells() -> None:
    full = draw_matrix(np.array(MATRIX, float), ["a", "b", "c"])
    partial = np.array(MATRIX, float)
    partial[3] = np.nan
    drawn = draw_matrix(partial, ["a", "b", "c"])
    assert full.dtype == np.uint8
    assert full.shape == drawn.shape
    white = [(image == 255).all(-1).mean() for image in (full, drawn)]
    assert white[1] > white[0] + 0.1  # a whole row is blank
    beside = draw_matrix(np.array(MATRIX, float), ["a", "b", "c"], np.array(BASE))
    assert beside.shape[0] == full.shape[0]
    assert beside.shape[1] > full.shape[1]  # a column more


class Save(Strategy):
    """Saves a checkpoint after a given micro-batch; a Strategy, so that its name is reported too."""

    def __init__(self, folder: Path, after: int) -> None:
        self.path, self.after = folder / "mid.ckpt", after

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if args[-1] == self.after:
            trainer.save_checkpoint(self.path)


def test_state_loads_under_weights_only_and_continues_the_matrix(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", ForgettingMonitor(), callbacks=[saver := Save(tmp_path, 3)])
    state = torch.load(saver.path, weights_only=True)["callbacks"]["ForgettingMonitor"]
    assert [row["after"] for row in state["rows"]] == [0, 1]
    resumed = ForgettingMonitor()
    resumed.load_state_dict(state)
    assert resumed.rows == state["rows"]
    first = load(Path(whole.log_dir))
    # Without row 0 in the state it would be measured again, on a model that is no longer the base.
    continued = ForgettingMonitor()
    continued.load_state_dict({"rows": [{**state["rows"][0], "step": -7}], "elapsed": 1000.0})
    again = load(Path(fit(tmp_path / "again", continued, callbacks=[Save(tmp_path, 99)]).log_dir))
    assert again["steps"] == [-7, 2, 5, 7]
    assert again["meta"].pop("wall_time") >= 1000
    first["meta"].pop("wall_time")
    assert first["meta"].pop("strategy") == {"Save": {"after": 3}}
    assert again["meta"].pop("strategy") == {"Save": {"after": 99}}
    assert {**again, "steps": first["steps"]} == first


def test_run_in_progress_has_nulls_and_no_half_files(tmp_path: Path) -> None:
    trainer = fit(tmp_path, ForgettingMonitor(), max_steps=3)
    found = load(Path(trainer.log_dir))
    assert found["matrix"] == [*MATRIX[:2], [None] * 3, [None] * 3]
    assert found["base_knowledge"]["accuracy"] == [1.0, 1.0, None, None]
    assert found["steps"] == [0, 2, None, None]
    assert found["metrics"]["AP"] == 1.0
    assert found["metrics"]["BWT"] is None
    assert not list(Path(trainer.log_dir).rglob("*.part"))


def test_other_loggers_get_scalars_and_settings_only(tmp_path: Path) -> None:
    trainer = fit(tmp_path, ForgettingMonitor(), Data(probe=False), logger=CSVLogger(str(tmp_path), "run"))
    folder = Path(trainer.log_dir)
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["task/task ;"]) for row in rows if row.get("task/task ;")] == [0, 0, 0, 1]
    assert not any(key.startswith("base/") for key in rows[0])
    found = load(folder)
    assert found["base_knowledge"] is None
    assert found["metrics"]["base_retention"] is None
    assert found["matrix"] == MATRIX


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), "run", default_hp_metric=False)
    fit(
        tmp_path,
        ForgettingMonitor(every_n_steps=1),
        Data([2, 1, 1], accumulate=2),
        logger=logger,
        accumulate_grad_batches=2,
    )
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [event.step for event in events.Scalars("task/task !")] == [0, 1, 2, 3, 4]


def test_evaluates_in_the_precision_of_training(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    class Watched(Module):
        def on_train_start(self) -> None:
            self.model.lm_head.register_forward_hook(lambda *call: seen.add(call[-1].dtype))

    trainer = fit(tmp_path, ForgettingMonitor(), module=Watched(), precision="bf16-mixed")
    assert seen == {torch.bfloat16}
    assert load(Path(trainer.log_dir))["matrix"] == MATRIX


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"every_n_steps": -1}, {"every_limit": 0}, {"batch_size": 0}])
def test_settings_that_measure_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=rf"forgetting\.{next(iter(wrong))}"):
        ForgettingMonitor(**wrong)


def test_unknown_metric_is_refused_before_anything_runs(tmp_path: Path) -> None:
    data = Data()
    data.tasks[1].metric = "bleurt"
    with pytest.raises(ConfigError, match="metric: 'bleurt' is unknown"):
        fit(tmp_path, ForgettingMonitor(), data)
