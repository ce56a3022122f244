"""``secura fit``: train a sequence of tasks, or resume it, through LightningCLI."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import secura_lightning.data.tasks
import secura_lightning.strategies  # noqa: F401  (makes class names known to the parser)
from secura_lightning.callbacks.checkpoint import SequenceCheckpoint
from secura_lightning.callbacks.config import RunConfig
from secura_lightning.callbacks.failures import FailureGuard, is_lost_rank, is_out_of_memory, memory_advice
from secura_lightning.callbacks.forgetting import ForgettingMonitor
from secura_lightning.callbacks.progress import SequenceProgressBar
from secura_lightning.callbacks.telemetry import Telemetry
from secura_lightning.callbacks.tensorboard import RunLogger
from secura_lightning.callbacks.throughput import Throughput
from secura_lightning.cli.checkpoints import find_checkpoint, read_checkpoint
from secura_lightning.cli.parsing import OneLineParser
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.module import ContinualModule
from secura_lightning.strategies.base import check_once

# Trainer keys that the sequence decides itself, and what to use instead
OWNED = {
    "max_epochs": "data.epochs_per_task or data.steps_per_task",
    "min_epochs": "data.epochs_per_task",
    "limit_train_batches": "data.steps_per_task",
    "overfit_batches": "data.steps_per_task",
    "fast_dev_run": "data.steps_per_task: 2",
}
CKPT_HELP = "Resume: `last`, a checkpoint file, or `auto`: the last one where there is one."


class FitCLI(LightningCLI):
    """LightningCLI with the sequence's parts in place: logger, forgetting monitor, checkpoints, progress bar."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the run's name, where it resumes, and the two callbacks that every run has."""
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run; the config's file name.")
        parser.add_argument("--save_dir", type=str, default="lightning_logs", help="Folder that holds the runs.")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=CKPT_HELP)
        parser.add_lightning_class_args(Throughput, "throughput")  # first: its clock stops before others evaluate
        parser.add_lightning_class_args(ForgettingMonitor, "forgetting")
        parser.add_lightning_class_args(FailureGuard, "failures")
        parser.add_lightning_class_args(Telemetry, "telemetry")
        parser.add_lightning_class_args(SequenceCheckpoint, "checkpoint")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse what the ``secura`` command passed on."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: a checkpoint never overrides what the user wrote."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the run's logger; a resumed run continues in its own folder."""
        self.resume_from = find_checkpoint(self.config.ckpt_path, self.run_root)
        config = self.config_init["trainer"]
        check_trainer(config)
        check_precision(config)
        if config.get("logger") in (None, True):
            kwargs["logger"] = self._logger()
        listed = config.get("callbacks") or []
        check_once(listed if isinstance(listed, list) else [listed])
        if config.get("enable_progress_bar") is not False:
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": [SequenceProgressBar()]}
        return super().instantiate_trainer(
            max_epochs=1, use_distributed_sampler=False, num_sanity_val_steps=0, **kwargs
        )

    @property
    def run_root(self) -> Path:
        """The folder that holds every version of this run."""
        return Path(self.config.save_dir) / run_name(self.config)

    def _logger(self) -> RunLogger:
        version, step = None, None
        if self.resume_from is not None:
            folder = self.resume_from.resolve().parent.parent
            if folder.parent == self.run_root.resolve():
                version = folder.name
                step = read_checkpoint(self.resume_from)["global_step"] + 1
        return RunLogger(self.config.save_dir, run_name(self.config), version, default_hp_metric=False, purge_step=step)


def check_trainer(config: Any) -> None:
    """Take the keys out of the trainer's settings that the sequence decides itself.

    Raises:
        ConfigError: One of them is set, or no batch makes a step.
    """
    accumulate = config.get("accumulate_grad_batches")
    if accumulate is not None and accumulate < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches is {accumulate}; it must be at least 1")
    for key, instead in OWNED.items():
        if config.get(key) not in (None, False, 0.0, 1.0, 1):
            raise ConfigError(f"trainer.{key}: the length of a run is set by its tasks; use {instead}")
        config.pop(key, None)


def check_precision(config: Any) -> None:
    """Refuse fp16 on a CPU, where Lightning would silently use another type.

    Raises:
        ConfigError: It is asked for.
    """
    accelerator = config.get("accelerator") or "auto"
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if str(config.get("precision")) in ("16", "16-mixed", "16-true") and (accelerator == "cpu" or not gpu):
        raise ConfigError(
            f"trainer.precision: {config.get('precision')} needs a GPU; on a CPU use bf16-mixed, bf16-true or 32-true"
        )


def run_name(config: Any) -> str:
    """The run's name: ``--name``, else the first config file's, else ``run``."""
    if config.name:
        return str(config.name)
    files = config.get("config") or []
    return Path(str(files[0].relative if hasattr(files[0], "relative") else files[0])).stem if files else "run"


def _seed(value: bool | int) -> int:
    if isinstance(value, bool):
        raise ConfigError("seed_everything: give a number; the run must be repeatable")
    if not 0 <= value < 2**32:
        raise ConfigError(f"seed_everything is {value}; it must be from 0 to {2**32 - 1}")
    return value


def quiet() -> None:
    """Drop the stack's advertisements and its word on epochs, of which a sequence is one; show this package's own
    warnings as one line, without the place in its source."""
    import logging

    dropped = ("litlogger", "litmodels", "`Trainer.fit` stopped: `max_epochs=1` reached.")

    class NoTips(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return not any(part in record.getMessage() for part in dropped)

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(NoTips())
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # lightning 2.6 on torch 2.13
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*logging interval.*")
    warnings.formatwarning = _format_warning


_PACKAGE = Path(__file__).parents[1]
_format_other_warning = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if Path(filename).is_relative_to(_PACKAGE):
        return f"warning: {message}\n"
    return _format_other_warning(message, category, filename, lineno, line)


def main(args: list[str]) -> int:
    """Parse, build and fit.

    Raises:
        ConfigError: The configuration is wrong.
        SecuraError: The data, base model or checkpoint is wrong.
    """
    quiet()
    try:
        _fit(args)
    except MisconfigurationException as error:  # Lightning's own word on the trainer's keys
        raise ConfigError(" ".join(str(error).split())) from error
    return 0


def _fit(args: list[str]) -> None:
    cli = parse(FitCLI, args)
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.resume_from, weights_only=True)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise SecuraError(memory_advice(cli.trainer, cli.model, cli.datamodule)) from error
        if is_lost_rank(error):
            text = str(error).strip().splitlines()
            raise SecuraError(
                f"rank {cli.trainer.global_rank}: another process of this run ended or hangs "
                f"({text[0][:120] if text else type(error).__name__}); its own output says why; continue with "
                "--ckpt_path last"
            ) from error
        raise


def parse(cli_class: type[FitCLI], args: list[str]) -> FitCLI:
    """Parse a configuration and build what it names.

    Raises:
        ConfigError: The configuration is wrong.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the adapters' settings in --help
    return cli_class(
        ContinualModule,
        SequenceDataModule,
        args=args,
        run=False,
        parser_class=OneLineParser,
        seed_everything_default=42,
        save_config_callback=RunConfig,
        trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
