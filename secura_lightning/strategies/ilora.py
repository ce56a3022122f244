"""I-LoRA (arXiv 2402.18865): a working and a long-term memory of the adapters, held together on replayed rows.

    theta_w        trained
    theta_l        <- d theta_l + (1 - d) theta_w         after every optimizer step, d = decay
    loss           (1 - w) CE(fresh) + w CE(replayed) + g MSE(h(theta_w), h(theta_l))       g = consistency

h are hidden states of the replayed rows, or their logits; the long-term memory computes them without dropout and
without gradient, and padding is left out of the mean. Replay and consistency begin with the second task. The run is
judged by the long-term memory, unless ``evaluate_with`` says otherwise.

What is averaged are the adapters' anchors. Where the change is linear in its core that is the product space: K_L + A
B of SECURA, which no fusion moves (the restraint scales the rows of both memories alike), U of CURLoRA, B of
LoRA-Null v2, the weights themselves of full fine-tuning. LoRA, DoRA, PiSSA, MiLoRA, LoRA-Null v1 and SECURA without
fusion average their factors A and B each, as the paper does: the average of products B A has a rank of its own and
would be no such adapter.

The two public implementations move no tensor of the long-term memory at all; here
``telemetry/slow_fast_distance`` shows ||theta_w - theta_l|| / ||theta_w||.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from secura_lightning.adapters import AdapterSet
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.modeling.loss import summed_cross_entropy
from secura_lightning.modeling.shard import is_sharded
from secura_lightning.strategies.memory import Memory, answering
from secura_lightning.strategies.replay import Replay, Replayed

Layers = Literal["last", "all", "logits"]
Weights = Literal["long_term", "working"]


class ILoRA(Replay):
    """I-LoRA: replay, with a slow average of the adapters that the trained ones must agree with.

    Args:
        replay_ratio: Replayed rows / (replayed + fresh rows) of a window. Where that is no whole number of rows, some
            windows hold one more than others.
        weight: Weight w of the replayed rows' cross-entropy; null: their share of the window's rows.
        decay: Share of itself that the long-term memory keeps at every optimizer step.
        warmup: Use min(k / (k + 1), decay) at step k = 0, 1, ..., so that the start is forgotten sooner.
        consistency: Weight g of the mean squared difference between the two memories.
        layers: What the memories are compared in: the ``last`` hidden states (after the final norm), those of ``all``
            layers in the mean, or the ``logits``.
        evaluate_with: The memory that is judged, and that ``secura merge`` writes by default.
    """

    order: ClassVar[int] = 10

    needs_anchors = True
    needs_tensors = True

    def __init__(
        self,
        replay_ratio: float = 0.5,
        weight: float | None = None,
        decay: float = 0.99,
        warmup: bool = False,
        consistency: float = 1.0,
        layers: Layers = "last",
        evaluate_with: Weights = "long_term",
    ) -> None:
        super().__init__(replay_ratio, weight)
        if not 0 <= decay < 1:
            raise ConfigError(f"trainer.callbacks.ILoRA.decay is {decay}; it must be at least 0 and below 1")
        if consistency < 0:
            raise ConfigError(f"trainer.callbacks.ILoRA.consistency is {consistency}; it must be at least 0")
        self.decay = decay
        self.warmup = warmup
        self.consistency = consistency
        self.layers = layers
        self.evaluate_with = evaluate_with
        self.memory: Memory | None = None
        self.steps = 0  # updates of the long-term memory
        self.joins = layers == "last" or not consistency
        self._restored: dict[str, Tensor] | None = None
        self._seen: list[Tensor] = []  # last hidden states of the forward that is under way

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The long-term memory, how often it was updated, and the state of every rank's draws."""
        values = self._restored if self.memory is None else self.memory.values
        return {**super().state_dict(), "long_term": dict(values or {}), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the long-term memory of a checkpoint."""
        super().load_state_dict(state_dict)
        self._restored = dict(state_dict["long_term"])
        self.steps = state_dict["steps"]

    # ------------------------------------------------------------------- hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the long-term memory at the working one, or where a checkpoint left it."""
        self.memory = Memory(pl_module.adapters, self._restored)  # type: ignore[arg-type]
        self._restored = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the long-term memory follow, after every whole optimizer step."""
        assert self.memory is not None
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.memory.follow(min(self.steps / (self.steps + 1), self.decay) if self.warmup else self.decay)
        self.steps += 1

    def evaluating(self, pl_module: LightningModule) -> AbstractContextManager[Any]:
        """The model with the long-term memory, if that is what is judged."""
        judged = self.memory is not None and self.evaluate_with == "long_term"
        return self.memory.active() if judged and self.memory is not None else nullcontext()

    def telemetry(self) -> dict[str, Tensor]:
        """The long-term memory's distance from the working one."""
        return {} if self.memory is None else {"slow_fast_distance": self.memory.distance()}

    # -------------------------------------------------------------------- loss

    def replay_loss(self, trainer: Trainer, pl_module: LightningModule, replayed: Replayed, weight: float) -> Tensor:
        """``w CE + g MSE`` of one micro-batch's replayed rows."""
        if not self.consistency:
            return weight * self.cross_entropy(pl_module, replayed)
        assert self.memory is not None
        inputs = {name: replayed.batch[name] for name in ("input_ids", "attention_mask")}
        model: Any = pl_module.model
        own, loss = self._forward(pl_module, inputs, replayed)
        with answering(model), self.memory.active():
            wanted = self._states(model, inputs)
        apart = sum(_squared(mine, kept, inputs["attention_mask"]) for mine, kept in zip(own, wanted, strict=True))
        apart = apart / (len(own) * replayed.tokens)
        pl_module.log_share("train/replay_loss", loss, batch_size=len(replayed.rows))  # type: ignore[operator]
        pl_module.log_share("ilora/consistency", apart, batch_size=len(replayed.rows))  # type: ignore[operator]
        return weight * loss + self.consistency * apart

    def watching(self, pl_module: LightningModule) -> AbstractContextManager[Any]:
        """Keep the last hidden states, where replayed rows may pass with the fresh ones."""
        replays = self._now is not None and self._now[0] is not None
        compared = replays and self.layers == "last" and self.consistency > 0
        return self._recording(pl_module.model) if compared else nullcontext()

    @contextmanager
    def _recording(self, model: Any) -> Iterator[None]:
        """Within the context the last hidden states of a forward are kept."""
        hook = model.base_model.register_forward_hook(lambda module, given, output: self._seen.append(output[0]))
        try:
            yield
        finally:
            hook.remove()

    def _forward(
        self, pl_module: LightningModule, inputs: dict[str, Tensor], replayed: Replayed
    ) -> tuple[list[Tensor], Tensor]:
        """The working memory's states as in :meth:`_states`, and the mean cross-entropy, from one forward."""
        model: Any = pl_module.model
        if self.layers == "last":  # the module may take the loss without ever holding all logits
            loss = replayed.loss
            if loss is None:
                with self._recording(pl_module.model):
                    loss = pl_module.answer_loss(replayed.batch)  # type: ignore[operator]
            rows, width = inputs["input_ids"].shape
            last, self._seen = self._seen[-1], []
            return [last[-rows:, :width]], loss / replayed.trained
        output = model(**inputs, output_hidden_states=self.layers == "all")
        states = [output.logits] if self.layers == "logits" else list(output.hidden_states[1:])
        return states, summed_cross_entropy(output.logits, replayed.batch["labels"]) / replayed.trained

    def _states(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """What the model computes now in the layers that are compared, each ``[b, t, d]``."""
        if self.layers == "logits":
            return [model(**inputs).logits]
        if is_sharded(model):  # all of it, whose hooks gather the weights; the head then has one token to compute for
            with self._recording(model):
                found = model(**inputs, output_hidden_states=self.layers == "all", logits_to_keep=1)
            last, self._seen = self._seen[-1], []
            return [last] if self.layers == "last" else list(found.hidden_states[1:])
        if self.layers == "last":
            return [model.base_model(**inputs).last_hidden_state]  # the head would compute for nothing
        return list(model.base_model(**inputs, output_hidden_states=True).hidden_states[1:])


def _squared(mine: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    """Squared difference, mean over features and summed over the tokens of ``mask`` [b, t]; a scalar in fp32."""
    places = mask.bool()
    return (mine[places].float() - kept[places].float()).square().mean(-1).sum()


def take_weights(adapters: AdapterSet, checkpoint: dict[str, Any], weights: Weights | None = None) -> None:
    """Move adapters that hold a checkpoint's working memory to the memory that is wanted.

    Args:
        adapters: The adapters, in place.
        checkpoint: The checkpoint.
        weights: Which memory; None for the one that the run was judged by.

    Raises:
        SecuraError: The long-term memory is wanted of a run without I-LoRA.
    """
    state = checkpoint.get("callbacks", {}).get(ILoRA.__qualname__)
    if state is None:
        if weights == "long_term":
            raise SecuraError("--weights long_term: the run had no ILoRA in trainer.callbacks; leave --weights out")
        return
    if (weights or checkpoint["strategies"]["ILoRA"]["evaluate_with"]) == "long_term":
        Memory(adapters, state["long_term"]).write()
