"""The interface of a continual-learning strategy: a Lightning callback that keeps its state in ``state_dict``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from secura_lightning.adapters import AdapterConfig
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.resumed import first_difference


class Strategy(Callback):
    """What a run does against forgetting, beside its adapter.

    A strategy is listed under ``trainer.callbacks``; several compose, acting in ascending :attr:`order` whatever their
    order in the list. It may define ``on_task_start`` and ``on_task_end`` (see :mod:`secura_lightning.callbacks.tasks`)
    and any hook of Lightning. A run without any strategy is the plain sequence, SEQ.

    A subclass keeps each argument of its constructor under the argument's own name, so that :meth:`settings` can tell.
    """

    order: ClassVar[int] = 50
    """Place among the strategies of a run: what holds rows first (0), losses that add rows next (10), then losses that
    compare with an earlier model (30), penalties (50), what changes the final gradient or weights last (90)."""
    role: ClassVar[str | None] = None
    """What at most one strategy of a run may do; None for what any number may do."""
    requires: ClassVar[tuple[type[Strategy], ...]] = ()
    """Strategies that this one works through; a run gets those that it does not list, with their defaults."""
    serves: ClassVar[bool] = False
    """Whether it acts for other strategies alone, and for nothing without one."""
    skipping: bool = False
    """While true, batches are drawn and steps counted, but nothing is trained."""
    needs_anchors: ClassVar[bool] = False
    """Whether it compares or averages the adapters' coordinates over tasks."""
    needs_tensors: ClassVar[bool] = False
    """Whether it reads or writes the trained tensors themselves, and so needs each of them whole in every process."""
    needs_logits: ClassVar[bool] = False
    """Whether :meth:`shape_loss` reads ``batch["logits"]``."""
    tokens_beside: tuple[int, int] = (0, 0)
    """Tokens that it trained on beside the fresh ones in this process so far: how many, and each times the length of
    its batch."""
    seconds_aside: float = 0.0
    """Seconds that it spent in this process so far on what is no training."""

    def rows_beside(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> dict[str, Tensor] | None:
        """Rows that may pass the model together with a fresh micro-batch; none by default.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The fresh micro-batch, before its forward.
            batch_idx: Its position in the sequence.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, each ``[r, u]``. Where they did pass,
            :meth:`shape_loss` finds their summed loss as ``batch["beside_loss"]``.
        """
        return None

    def watching(self, pl_module: LightningModule) -> AbstractContextManager[Any]:
        """A context around the forward of a training step, to see what passes; nothing by default."""
        return nullcontext()

    def shape_loss(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, batch: dict[str, Any], batch_idx: int
    ) -> Tensor:
        """Change the loss of one micro-batch before its backward; unchanged by default.

        Args:
            trainer: The trainer.
            pl_module: The module.
            loss: Scalar; the fresh rows' loss as shaped by the strategies before this one. Its gradient, averaged over
                the micro-batches of a window and over the ranks, is the window's.
            batch: The fresh micro-batch; with the logits of its forward, ``[b, t, v]``, as ``logits`` where a strategy
                of the run has :attr:`needs_logits`; with ``beside_loss`` where :meth:`rows_beside` passed with it.
            batch_idx: Its position in the sequence.
        """
        return loss

    def evaluating(self, pl_module: LightningModule) -> AbstractContextManager[Any]:
        """A context in which the model answers as this strategy wants it to be judged; as it is by default."""
        return nullcontext()

    def telemetry(self) -> dict[str, Tensor]:
        """Scalars that describe its state, logged beside the adapters' own; none by default."""
        return {}

    def outcome(self) -> dict[str, Any]:
        """What the run's report says of it, as plain values under a key of its own; nothing by default."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that the strategy keeps under their names, as plain values."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if hasattr(self, name)}


def strategies_of(trainer: Trainer) -> list[Strategy]:
    """The strategies of a run, in the order in which they act."""
    return in_order(trainer.callbacks)  # type: ignore[attr-defined]


def in_order(callbacks: Sequence[Callback]) -> list[Strategy]:
    """The strategies among ``callbacks``, in the order in which they act."""
    found = [callback for callback in callbacks if isinstance(callback, Strategy)]
    return sorted(found, key=lambda strategy: strategy.order)


def describe(strategies: Sequence[Strategy]) -> dict[str, dict[str, Any]]:
    """Settings by class name, as plain values; empty for SEQ."""
    return {type(strategy).__name__: strategy.settings() for strategy in strategies}


def check_once(callbacks: Sequence[Callback]) -> None:
    """Refuse two strategies of one class.

    Raises:
        ConfigError: There are two.
    """
    names = [type(strategy).__name__ for strategy in in_order(callbacks)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"trainer.callbacks: {name} is listed twice; keep one, with the settings that you want")


def complete(strategies: Sequence[Strategy]) -> list[Strategy]:
    """Refuse what means nothing together, and build what the strategies of a run need beside them.

    Raises:
        ConfigError: Two strategies have the same role or class, or one serves no other.
    """
    check_once(strategies)
    for i, one in enumerate(strategies):
        for other in strategies[:i]:
            if one.role is not None and one.role == other.role:
                raise ConfigError(
                    f"trainer.callbacks: {type(other).__name__} and {type(one).__name__} both {one.role}; keep one"
                )
    needed = dict.fromkeys(kind for strategy in strategies for kind in strategy.requires)
    for strategy in strategies:
        if strategy.serves and not any(isinstance(strategy, kind) for kind in needed):
            raise ConfigError(
                f"trainer.callbacks: no strategy of this run uses {type(strategy).__name__}; remove it, or add one "
                "that replays, such as ER"
            )
    return [kind() for kind in needed if not any(isinstance(strategy, kind) for strategy in strategies)]


def check_adapter(strategies: Sequence[Strategy], config: AdapterConfig) -> None:
    """Refuse strategies that hold on to coordinates which the adapter replaces with every task.

    Raises:
        ConfigError: There is one.
    """
    for strategy in strategies:
        if config.accumulates and strategy.needs_anchors:
            raise ConfigError(
                f"trainer.callbacks.{type(strategy).__name__}: {type(config).__name__} takes new coordinates "
                "for every task, which nothing can hold on to: use LoRANullConfig, or a strategy such as ER"
            )


def check_sharded(strategies: Sequence[Strategy], config: AdapterConfig) -> None:
    """Refuse strategies that need tensors whole which a sharded base spreads over the processes.

    Raises:
        ConfigError: There is one.
    """
    for strategy in strategies:
        if config.whole_weights and strategy.needs_tensors:
            raise ConfigError(
                f"trainer.callbacks.{type(strategy).__name__}: holds {type(config).__name__}'s weights whole in every "
                "process, and trainer.strategy: ShardedStrategy spreads them: use trainer.strategy: ddp, another "
                "adapter, or a strategy such as ER"
            )


def check_resumed(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare the strategies of a checkpoint with this run's, as :func:`describe` gives both.

    Raises:
        SecuraError: They differ; the message names the first one that does.
    """
    for name in dict.fromkeys([*then, *now]):
        if name not in then or name not in now:
            where, other = ("checkpoint", "configuration") if name in then else ("configuration", "checkpoint")
            raise SecuraError(
                f"--ckpt_path: the {where} has {name} in trainer.callbacks and the {other} has not; resume with the "
                "configuration that wrote it"
            )
        if found := first_difference(then[name], now[name]):
            key, before, value = found
            raise SecuraError(
                f"--ckpt_path: the checkpoint has {key}={before} in trainer.callbacks' {name}, this configuration has "
                f"{value}; resume with the configuration that wrote it"
            )
