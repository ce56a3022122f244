"""The retention guard: a promise on base knowledge, kept while training.

Every so many steps a part of the base-knowledge probe is scored; retention is the mean over kinds of min(1, score /
score of the untouched base). The other part of the probe is what the run's report scores, as the held-out part
(:mod:`secura_lightning.strategies.watch`), so that the promise is checked on questions that never steered anything.
When retention falls below the floor:

* ``stop``: the weights return to the last check that kept the floor, and the task's remaining batches are drawn but
  not trained on, so that positions and schedules stay what they were;
* ``dial``: the task is learned to its end, and its change is then scaled back on the straight path between the adapter
  at the task's start and at its end, theta(t) = theta_0 + t (theta_1 - theta_0), to the largest t of a bisection that
  keeps the floor. The path runs through the adapter's anchors: its trained tensors, or for SECURA with fusion K_L + A
  B (fusion ``base``: the change of W_t), in which fusion moves nothing. t = 0 and t = 1 are the two states exactly.
  Bisection takes retention to fall along the path; where it does not, a larger t may keep the floor too.

Every check scores what would be kept if the task ended there, with all that the adapter does at a task's end: fusion
and SECURA's restraint, the truncation of a bounded ``frozen_rank``. So the state that a task leaves was itself scored
and kept the floor, unless the state that the task began in does not.
"""

from __future__ import annotations

import time
import warnings
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from secura_lightning.adapters import AdapterSet
from secura_lightning.callbacks import tensorboard
from secura_lightning.data.probe import Probe
from secura_lightning.data.task import Task
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation.evaluate import ProbeScore, evaluate_probe
from secura_lightning.strategies.base import Strategy, strategies_of
from secura_lightning.strategies.memory import Memory, as_if_ended
from secura_lightning.strategies.ranks import most
from secura_lightning.strategies.watch import Answers, ProbePart, answers_of, retention, retention_bound, split_probe


class RetentionGuard(Strategy):
    """Keeps the retention of base knowledge above a floor.

    Args:
        floor: Least retention, in 0..1.
        policy: What happens below it: ``stop`` the task at its last good state, or ``dial`` its change back at its end.
        every_n_steps: Optimizer steps between two checks within a task.
        limit: Questions of the watched part that are asked; null for all.
        share: Part of the probe's questions of each kind that is watched; the report scores the rest.
        watch: Another probe to watch; the report then scores all of ``data.probe``.
        bisections: Steps of the bisection; t is found to 2 ** -bisections.
        batch_size: Sequences computed together.
        confidence: Ask that the floor holds with this probability on questions like the watched ones, not on these
            alone, which pass partly by luck: the lower end of an interval over them must reach it. Null: no more than
            that the watched questions pass.
    """

    order: ClassVar[int] = 5  # at a task's end before those that remember where it ended
    needs_tensors: ClassVar[bool] = True

    def __init__(
        self,
        floor: float = 0.95,
        policy: Literal["stop", "dial"] = "stop",
        every_n_steps: int = 50,
        limit: int | None = None,
        share: float = 0.5,
        watch: Probe | None = None,
        bisections: int = 6,
        batch_size: int = 64,
        confidence: float | None = None,
    ) -> None:
        name = "trainer.callbacks.RetentionGuard"
        if policy not in ("stop", "dial"):
            raise ConfigError(f"{name}.policy is {policy!r}; choose stop or dial")
        for key, value, low in (("floor", floor, 0.0), ("share", share, 0.0)):
            if not low < value <= 1 or (key == "share" and value == 1):
                raise ConfigError(f"{name}.{key} is {value}; it must lie between 0 and 1")
        if confidence is not None and not 0.5 <= confidence < 1:
            raise ConfigError(f"{name}.confidence is {confidence}; give a probability from 0.5 to below 1, or null")
        counts = {"every_n_steps": every_n_steps, "bisections": bisections, "batch_size": batch_size, "limit": limit}
        for key, count in counts.items():
            if count is not None and count < 1:
                raise ConfigError(f"{name}.{key} is {count}; it must be at least 1")
        self.floor = floor
        self.policy = policy
        self.every_n_steps = every_n_steps
        self.limit = limit
        self.share = share
        self.watch = watch
        self.bisections = bisections
        self.batch_size = batch_size
        self.confidence = confidence
        self.normalise = False  # as the report does
        self.watched: Probe | None = None
        self.held_out: Probe | None = None  # what the report scores
        self.base: ProbeScore | None = None  # of the untouched base
        self.answers: Answers = {}  # its score of every watched question
        self.good: dict[str, Tensor] = {}  # the adapters' state at the last check that kept the floor
        self.good_step = 0  # steps of the task that it has learned
        self.start: dict[str, Tensor] = {}  # the adapters' anchors as the task began
        self.rows: list[dict[str, Any]] = []  # one per finished task

    # ------------------------------------------------------------------- state

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments by name; another probe by its name."""
        return {**super().settings(), "watch": self.watch.name if self.watch else None}

    def state_dict(self) -> dict[str, Any]:
        """The base's score, the states to return to, and what was done so far."""
        base = self.base and {"kinds": dict(self.base.kinds), "perplexity": self.base.perplexity}
        kept = ("good", "good_step", "start", "rows", "skipping", "answers")
        return {"base": base, **{key: getattr(self, key) for key in kept}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue under the promise of a checkpoint."""
        for key in ("good", "good_step", "start", "rows", "skipping"):
            setattr(self, key, state_dict[key])
        self.answers = state_dict.get("answers", {})  # which 0.1.0 did not keep
        then = state_dict["base"]
        if then is not None:
            self.base = ProbeScore("", dict(then["kinds"]), float("nan"), then["perplexity"], 0, 0, None)

    def outcome(self) -> dict[str, Any]:
        """The promise, what it is kept by and what the report scores, and each task's retention (of what is watched),
        scale and steps."""
        told = {"floor": self.floor, "policy": self.policy, "confidence": self.confidence}
        parts = {"watched": _size(self.watched), "held_out": _size(self.held_out)}
        return {"guard": {**told, **parts, "tasks": list(self.rows)}}

    # ------------------------------------------------------------------- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Divide the probe.

        Raises:
            ConfigError: There is no probe, or another strategy is judged by weights that are not the trained ones.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for other in strategies_of(trainer):
            if getattr(other, "evaluate_with", "working") != "working":
                raise ConfigError(
                    f"trainer.callbacks: RetentionGuard holds the trained weights, and {type(other).__name__} is "
                    "judged by others; set its evaluate_with: working, or drop the guard"
                )
        # Here, because that module imports this package.
        from secura_lightning.callbacks.forgetting import ForgettingMonitor

        monitors = [callback for callback in trainer.callbacks if isinstance(callback, ForgettingMonitor)]  # type: ignore[attr-defined]
        self.normalise = bool(monitors) and monitors[0].normalise
        if self.watch is not None:
            self.watched = self.watch
            data.render(self.watch)
        elif data.probe is None:
            raise ConfigError("trainer.callbacks.RetentionGuard has nothing to watch: set data.probe, or its own watch")
        else:
            whole = data.probe.whole if isinstance(data.probe, ProbePart) else data.probe  # fitted before
            self.watched, data.probe = split_probe(whole, self.share)
        if self.confidence is not None and not self.watched.rows():
            raise ConfigError(
                f"trainer.callbacks.RetentionGuard.confidence: the probe '{self.watched.name}' is text alone, and a "
                "confidence is one over questions; set confidence: null"
            )
        self.held_out = data.probe
        warnings.filterwarnings(
            "ignore", message=".*training_step. returned .None.*"
        )  # while the guard lets steps pass

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Task) -> None:
        """Remember where the task starts, which is good until a check says otherwise."""
        adapters = _adapters(pl_module)
        if self.base is None:
            with adapters.disabled():
                self.base = self._score(trainer, pl_module)
            self.answers = answers_of(self.base)
        self.skipping = False
        self.start = Memory(adapters).values if self.policy == "dial" else {}
        self._keep(adapters, 0)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """While the task passes, leave the optimizer nothing to act on: no momentum, no decay."""
        if self.skipping:
            for parameter in _adapters(pl_module).trainable_parameters():
                parameter.grad = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check now and then within a task; its end is checked by :meth:`on_task_end`."""
        plan: Any = trainer.datamodule.plan  # type: ignore[attr-defined]
        done = plan.locate(batch_idx).step + 1
        if self.skipping or (batch_idx + 1) % plan.accumulate or plan.ends_task(batch_idx) or done % self.every_n_steps:
            return
        value, sure = self._retention(trainer, pl_module)
        _log(trainer, {"guard/retention": value, "guard/floor": self.floor})
        if self.policy == "dial":
            return
        if sure >= self.floor:
            self._keep(_adapters(pl_module), done)
        else:
            self._stop(pl_module)

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Task) -> None:
        """See to it that the task ends above the floor."""
        steps = trainer.datamodule.plan.steps[index]  # type: ignore[attr-defined]
        (value, sure), scale = self._retention(trainer, pl_module), 1.0
        before = value
        if sure >= self.floor:
            learned = self.good_step if self.skipping else steps
        elif self.policy == "stop":
            self._stop(pl_module)
            learned, (value, sure) = self.good_step, self._retention(trainer, pl_module)
        else:
            scale, (value, sure) = self._dial(trainer, pl_module)
            learned = steps
        self.skipping = False
        told = {"task": task.name, "retention": value, "sure": sure, "undialled": before}
        self.rows = [*self.rows, {**told, "scale": scale, "steps": learned}]
        scalars = {"retention": value, "floor": self.floor, "scale": scale, "steps": learned}
        _log(trainer, {f"guard/{name}": number for name, number in scalars.items()})

    # ------------------------------------------------------------------ acting

    def _stop(self, pl_module: LightningModule) -> None:
        """Return to the last good state, and stay there to the task's end."""
        _adapters(pl_module).restore(self.good)
        self.skipping = True

    def _dial(self, trainer: Trainer, pl_module: LightningModule) -> tuple[float, tuple[float, float]]:
        """Scale the task's change back; its scale, and :meth:`_retention` there."""
        adapters = _adapters(pl_module)
        end = Memory(adapters)
        low, high = 0.0, 1.0
        kept: tuple[float, float] | None = None
        for _ in range(self.bisections):
            middle = (low + high) / 2
            move(adapters, self.start, end.values, middle)
            found = self._retention(trainer, pl_module)
            low, high, kept = (middle, high, found) if found[1] >= self.floor else (low, middle, kept)
        if low == 0.0:
            adapters.restore(self.good)  # under this policy the task's start, exactly
            return low, self._retention(trainer, pl_module)
        move(adapters, self.start, end.values, low)
        assert kept is not None
        return low, kept

    def _keep(self, adapters: AdapterSet, step: int) -> None:
        self.good = adapters.snapshot()
        self.good_step = step

    def _retention(self, trainer: Trainer, pl_module: LightningModule) -> tuple[float, float]:
        """Retention of what would be kept if the task ended now: on what is watched, and what of it is sure."""
        assert self.base is not None
        with as_if_ended(_adapters(pl_module)):
            score = self._score(trainer, pl_module)
        value = sure = retention(score, self.base)
        if self.confidence is not None:
            sure = retention_bound(answers_of(score), self.answers, self.confidence)
        model: Any = pl_module.model
        return most(value, model), most(sure, model)  # what ranks do about it must be the same

    def _score(self, trainer: Trainer, pl_module: LightningModule) -> ProbeScore:
        assert self.watched is not None
        model: Any = pl_module.model
        tokenizer: Any = pl_module.tokenizer
        started = time.perf_counter()
        try:
            with trainer.precision_plugin.forward_context():
                return evaluate_probe(model, tokenizer, self.watched, self.limit, self.batch_size, self.normalise)
        finally:
            self.seconds_aside += time.perf_counter() - started


def move(adapters: AdapterSet, start: dict[str, Tensor], end: dict[str, Tensor], scale: float) -> None:
    """Move the adapters to ``start + scale (end - start)``, by anchors."""
    device = next(iter(adapters.anchors().values())).device
    values = {name: torch.lerp(start[name].to(device), end[name].to(device), scale) for name in end}
    Memory(adapters, values).write()


def _adapters(pl_module: LightningModule) -> AdapterSet:
    return pl_module.adapters  # type: ignore[return-value]


def _size(probe: Probe | None) -> dict[str, Any] | None:
    """A probe's name, and how much it asks."""
    return None if probe is None else {"probe": probe.name, "questions": len(probe.rows()), "texts": len(probe.texts())}


def _log(trainer: Trainer, scalars: dict[str, float | None]) -> None:
    if trainer.is_global_zero:
        tensorboard.log_scalars(trainer.loggers, scalars, trainer.global_step)
