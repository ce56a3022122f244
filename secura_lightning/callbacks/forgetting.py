"""The callback that measures forgetting: every task and the base probe, before the first task and after each.

    on_train_start   -> row 0: the untouched base
    on_task_end k    -> row k+1: every task, seen or not, and the probe
    every n steps    -> scalars only, on a subset

Its rows are its state: a resumed run continues the same matrix.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from secura_lightning.callbacks import hparams, report, tensorboard
from secura_lightning.data.task import Split, Task
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation.evaluate import ProbeScore, TaskScore, evaluate_probe, evaluate_task
from secura_lightning.metrics.text import check_metric
from secura_lightning.resumed import first_difference
from secura_lightning.strategies.base import describe, strategies_of


class ForgettingMonitor(Callback):
    """Evaluates all tasks and the base-knowledge probe, and writes ``continual.json``.

    Args:
        limit: Rows of each task and of the probe that are scored, always the same ones; null for all.
        every_n_steps: Also evaluate every so many optimizer steps within a task, for the curves; null for never.
        every_limit: Rows of each task and of the probe in those evaluations.
        batch_size: Sequences computed together.
        samples: Generations per task that are shown in TensorBoard.
        normalise: Divide the likelihood of multiple-choice answers by their length.
        split: Rows of the tasks that are scored: ``validation`` to choose settings by, ``test`` to report.
    """

    def __init__(
        self,
        limit: int | None = None,
        every_n_steps: int | None = None,
        every_limit: int = 32,
        batch_size: int = 64,
        samples: int = 2,
        normalise: bool = False,
        split: Literal["test", "validation"] = "test",
    ) -> None:
        for key, value in (("limit", limit), ("every_n_steps", every_n_steps), ("every_limit", every_limit)):
            if value is not None and value < 1:
                raise ConfigError(f"forgetting.{key} is {value}; it must be at least 1 (or null)")
        if batch_size < 1 or samples < 0:
            raise ConfigError("forgetting.batch_size must be at least 1 and forgetting.samples at least 0")
        self.limit = limit
        self.every_n_steps = every_n_steps
        self.every_limit = every_limit
        self.batch_size = batch_size
        self.samples = samples
        self.normalise = normalise
        self.split: Split = split
        self.rows: list[report.Measurement] = []  # one per finished evaluation: row 0, then one a task
        self._elapsed = 0.0  # seconds of earlier sessions of this run
        self._started = time.monotonic()

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far and the time that they took, as plain values."""
        return {"rows": self.rows, "elapsed": self._wall_time(), "settings": self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the measurements of a checkpoint.

        Raises:
            ConfigError: Its rows were measured otherwise than this configuration measures.
        """
        found = first_difference(state_dict.get("settings", {}), self._settings())  # checkpoints of 0.1.0 lack them
        if found:
            key, then, now = found
            raise ConfigError(
                f"forgetting.{key}: the checkpoint's rows were measured with {then}, this configuration has {now}; "
                "one matrix needs one measure: resume with the same"
            )
        self.rows = list(state_dict["rows"])
        self._elapsed = state_dict["elapsed"]
        self._started = time.monotonic()

    def _settings(self) -> dict[str, Any]:
        """What decides the rows that are scored, and how."""
        return {"split": self.split, "limit": self.limit, "normalise": self.normalise}

    def _wall_time(self) -> float:
        return self._elapsed + time.monotonic() - self._started

    # ------------------------------------------------------------------- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse unknown metrics before anything is trained, and start the clock."""
        for task in _tasks(trainer):
            if not task.is_text:
                check_metric(task.metric)
        self._started = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the untouched base, unless a checkpoint brought that row."""
        if trainer.is_global_zero:
            probe = _probe(trainer)
            strategies = strategies_of(trainer)
            asks, reads = (bool(probe and probe.rows()), bool(probe and probe.texts()))
            guarded = any("guard" in strategy.outcome() for strategy in strategies)
            tensorboard.add_layout(trainer.loggers, asks, reads, guarded)
            group = trainer.optimizers[0].param_groups[0]
            hparams.begin(trainer.loggers, hparams.columns_of(self._meta(trainer, pl_module), group, strategies))
        if not self.rows:
            self._measure(trainer, pl_module, after=0)

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Task) -> None:
        """Measure everything after a finished task."""
        self._measure(trainer, pl_module, after=index + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every ``every_n_steps`` optimizer steps, log scores on a subset. A task's last step is measured in full."""
        plan: Any = trainer.datamodule.plan  # type: ignore[attr-defined]
        if self.every_n_steps is None or trainer.global_step % self.every_n_steps:
            return
        if (batch_idx + 1) % plan.accumulate or plan.ends_task(batch_idx):
            return
        scores, base = self._evaluate(trainer, pl_module, self.every_limit)
        self._log_scores(trainer, scores, base)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table and where everything lies, and tell the loggers what ran."""
        content, folder = self._write(trainer, pl_module), trainer.log_dir  # collective calls
        if not trainer.is_global_zero:
            return
        params = {**content["meta"], "tasks": content["tasks"]}
        for passing in ("wall_time", "versions", "git_commit"):
            params.pop(passing)
        for logger in trainer.loggers:
            logger.log_hyperparams(params)
        hparams.end(trainer.loggers)
        where = "" if folder is None else f"\nwrote {folder}\n"
        print(f"\n{report.table(content)}\n{where}")

    # --------------------------------------------------------------- measuring

    def _measure(self, trainer: Trainer, pl_module: LightningModule, after: int) -> None:
        """Evaluate, remember as the row after ``after`` tasks, log and write."""
        scores, base = self._evaluate(trainer, pl_module, self.limit)
        kept = [row for row in self.rows if row["after"] < after]
        row = {
            "after": after,
            "step": trainer.global_step,
            "tasks": [score.summary() for score in scores],
            "base": {**report.base_of(base), "part": _probe(trainer).part} if base else None,
        }
        self.rows = [*kept, row]
        self._write(trainer, pl_module, scores, base)
        self._log_scores(trainer, scores, base)
        if not trainer.is_global_zero:
            return
        names, step = _names(trainer), trainer.global_step
        metrics = report.metrics_of(self.rows, len(names))
        tensorboard.log_scalars(trainer.loggers, {f"continual/{key}": value for key, value in metrics.items()}, step)
        matrix, column = report.matrix_of(self.rows, len(names)), report.base_column(self.rows, len(names))
        tensorboard.add_matrix(trainer.loggers, "matrix", matrix, names, step, column)
        for score in scores:
            tensorboard.add_samples(trainer.loggers, f"samples/{score.task}", score.rows[: self.samples], step)

    def _evaluate(
        self, trainer: Trainer, pl_module: LightningModule, limit: int | None
    ) -> tuple[list[TaskScore], ProbeScore | None]:
        """Score the model on all tasks and the probe, in the precision that it trains in."""
        model: Any = pl_module.model
        tokenizer: Any = pl_module.tokenizer
        tasks, probe = _tasks(trainer), _probe(trainer)
        disable = None if trainer.is_global_zero else True  # None: no bar where there is no terminal
        with ExitStack() as stack:
            for strategy in strategies_of(trainer):
                stack.enter_context(strategy.evaluating(pl_module))
            stack.enter_context(trainer.precision_plugin.forward_context())
            bar = stack.enter_context(tqdm(leave=False, disable=disable, unit=" rows"))
            options: Any = {"batch_size": self.batch_size, "normalise": self.normalise, "progress": bar.update}
            scores = []
            for task in tasks:
                bar.set_description(f"Evaluating {task.name}")
                scores.append(evaluate_task(model, tokenizer, task, self.split, limit, **options))
            if probe is None:
                return scores, None
            bar.set_description(f"Evaluating {probe.name}")
            return scores, evaluate_probe(model, tokenizer, probe, limit, **options)

    def _log_scores(self, trainer: Trainer, scores: list[TaskScore], base: ProbeScore | None) -> None:
        if not trainer.is_global_zero:
            return
        scalars: dict[str, float | None] = {f"task/{score.task}": score.value for score in scores}
        if base:
            scalars |= {f"base/{kind}": value for kind, value in base.kinds.items()}
            scalars |= {"base/accuracy": base.accuracy, "base/perplexity": base.perplexity}
        tensorboard.log_scalars(trainer.loggers, scalars, trainer.global_step)

    # ----------------------------------------------------------------- writing

    def _write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        scores: list[TaskScore] | None = None,
        base: ProbeScore | None = None,
    ) -> dict[str, Any]:
        """Write the report, and the predictions of the newest row where given. Called on all ranks."""
        folder = trainer.log_dir  # a collective call
        content = report.build(self.rows, _names(trainer), self._meta(trainer, pl_module))
        if trainer.is_global_zero and folder is not None:
            after = self.rows[-1]["after"]
            for score in scores or []:
                report.save_predictions(score.rows, report.predictions_path(Path(folder), after, score.task))
            if base:
                report.save_predictions(base.rows, report.predictions_path(Path(folder), after, None))
            report.save(content, Path(folder))
        return content

    def _meta(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {
            **pl_module.describe(),  # type: ignore[operator]
            "strategy": describe(strategies_of(trainer)) or "SEQ",
            "split": self.split,
            "data": trainer.datamodule.describe(),  # type: ignore[attr-defined]
            **report.environment(),
            "wall_time": round(self._wall_time(), 3),
            **{key: value for strategy in strategies_of(trainer) for key, value in strategy.outcome().items()},
        }


def _tasks(trainer: Trainer) -> list[Task]:
    return trainer.datamodule.tasks  # type: ignore[attr-defined]


def _names(trainer: Trainer) -> list[str]:
    return [str(task.name) for task in _tasks(trainer)]


def _probe(trainer: Trainer) -> Any:
    return trainer.datamodule.probe  # type: ignore[attr-defined]
