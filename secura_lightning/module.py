"""The LightningModule: a base language model with injected adapters, trained on answers only."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning import rng
from secura_lightning._version import __version__
from secura_lightning.adapters import AdapterConfig, AdapterSet, Fusion, SECURAConfig, describe_adapter, inject
from secura_lightning.callbacks.tasks import TaskEnd, TaskStart
from secura_lightning.callbacks.tensorboard import log_scalars
from secura_lightning.data.encode import pad_id
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.engine import ShardedStrategy, check_optimizer
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.export.saved import start_from
from secura_lightning.modeling.calibrate import Calibration, SelfCalibration, TaskCalibration, accumulate, calibrate
from secura_lightning.modeling.liger import apply_liger
from secura_lightning.modeling.load import (
    BaseSpec,
    ComputeType,
    Init,
    Quantization,
    StorageType,
    compile_blocks,
    enable_checkpointing,
    fingerprint,
    load_model,
    load_tokenizer,
    stored_in,
)
from secura_lightning.modeling.loss import ChunkedLoss, choose_loss, summed_cross_entropy
from secura_lightning.modeling.packing import check_packing, packed_inputs
from secura_lightning.modeling.shard import load_sharded
from secura_lightning.resumed import check_identity, describe_optimizer, recount
from secura_lightning.schedule import Schedule
from secura_lightning.strategies.base import (
    check_adapter,
    check_resumed,
    check_sharded,
    complete,
    describe,
    strategies_of,
)
from secura_lightning.strategies.joint import join
from secura_lightning.strategies.ranks import most


class ContinualModule(LightningModule):
    """A causal language model that learns one task after another through adapters.

    Args:
        base: ``pocket`` (embedded), a local Hugging Face folder, or a hub id.
        adapter: What is trained, and how it is held back.
        optimizer: Optimizer of the trained tensors.
        schedule: Learning rate within a task.
        reset_optimizer: Forget the optimizer's moments at every task start. The schedule restarts in any case.
        revision: Pinned revision of a hub id.
        init: ``random`` builds the base from its config alone, for pretraining.
        dtype: Storage type of the base weights; adapters are always fp32 or better.
        quantization: 4-bit or 8-bit base through bitsandbytes.
        double_quant: Quantise the 4-bit scales too.
        compute_dtype: Type that quantised weights are multiplied in.
        attn_implementation: Attention kernel (``sdpa``, ``eager``, ``flash_attention_2``).
        trust_remote_code: Run code from the model's repository.
        seed: Seed of the adapters' initial values.
        calibration: Text that stands for what the model must keep, for adapters that start from it (LoRA-Null); null:
            samples of the base model itself.
        activation_checkpointing: Compute each block again in backward instead of keeping its activations.
        chunked_loss: Never hold the logits of all tokens; null: where the vocabulary is large.
        compile_blocks: Compile each block with torch.compile; the first steps take minutes.
        liger: Use liger-kernel's fused kernels in the base, on a CUDA GPU; not with a sharded base.
        start: Adapter folder of ``secura import`` or ``secura export --format safetensors`` whose tensors the adapters
            start from; the first line of the results is then the base with these.

    Raises:
        ConfigError: The adapter uses no calibration.
    """

    model: PreTrainedModel
    adapters: AdapterSet

    def __init__(
        self,
        base: str = "pocket",
        adapter: AdapterConfig | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        reset_optimizer: bool = True,
        revision: str | None = None,
        init: Init = "pretrained",
        dtype: StorageType = "float32",
        quantization: Quantization = "none",
        double_quant: bool = True,
        compute_dtype: ComputeType = "bfloat16",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        calibration: Calibration | None = None,
        activation_checkpointing: bool = False,
        chunked_loss: bool | None = None,
        compile_blocks: bool = False,
        liger: bool = False,
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.spec = BaseSpec(
            base=base,
            revision=revision,
            init=init,
            dtype=dtype,
            quantization=quantization,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        self.adapter = adapter or SECURAConfig()
        if calibration is not None and not self.adapter.needs_calibration:
            raise ConfigError(f"model.calibration: {type(self.adapter).__name__} starts without calibration: remove it")
        self.calibration = calibration or SelfCalibration()
        self.optimizer = optimizer
        self.schedule = schedule
        self.reset_optimizer = reset_optimizer
        self.seed = seed
        self.activation_checkpointing = activation_checkpointing
        self.chunked_loss = chunked_loss
        self.compile_blocks = compile_blocks
        self.liger = liger
        self.start = start
        self.base_fingerprint = ""
        self._chunked: ChunkedLoss | None = None
        self._window: dict[str, Tensor] = {}  # sums over the micro-batches of a window so far, to log
        self._restored_rng: dict[str, Any] | None = None
        # The trained tensors are checked by name when a checkpoint is loaded; Lightning must not expect the base's.
        self.strict_loading = False

    # ---------------------------------------------------------------- building

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, loaded on first use."""
        return load_tokenizer(self.spec)

    def configure_model(self) -> None:
        """Load the base and inject the adapters; Lightning calls this once the devices are known."""
        if hasattr(self, "adapters"):
            return
        engine = self._trainer.strategy if self._trainer is not None else None
        if self._trainer is not None:
            self.spec = stored_in(self.spec, self._trainer.precision)
        if isinstance(engine, ShardedStrategy):
            if self.liger:
                raise ConfigError("model.liger: not with a sharded base; set model.liger: false")
            self.model, self.adapters, self.base_fingerprint = load_sharded(
                self.spec, self.adapter, self.seed, engine.mesh, engine.root_device
            )
        else:
            if self.spec.init == "random":
                torch.manual_seed(self.seed)
            model = load_model(self.spec)
            self.base_fingerprint = fingerprint(model)
            if self.liger and engine is not None:
                apply_liger(model, engine.root_device)
            self.adapters = inject(model, self.adapter, self.seed)
            self.model = model
        if self.start is not None:
            start_from(self.adapters, self.start)
        if self.activation_checkpointing:
            enable_checkpointing(self.model)
        if self.compile_blocks:
            compile_blocks(self.model)
        rank_zero_info(self.adapters.report())

    def to(self, *args: Any, **kwargs: Any) -> ContinualModule:
        """Move to a device. Types stay: the base has its own, and adapters are fp32 whatever ``trainer.precision``."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        return self if device is None else super().to(device)

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that turn batch positions into task hooks, and what the run's strategies need beside them.

        Raises:
            ConfigError: Strategies do not go together, or not with the adapter.
        """
        strategies = strategies_of(self.trainer)
        check_adapter(strategies, self.adapter)
        if isinstance(self.trainer.strategy, ShardedStrategy):
            check_sharded(strategies, self.adapter)
        return [*complete(strategies), TaskStart(), TaskEnd()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the trained tensors alone, with a schedule that restarts at every task."""
        optimizer = self.optimizer(self.adapters.trainable_parameters())
        if isinstance(self.trainer.strategy, ShardedStrategy) and self.adapter.whole_weights:
            check_optimizer(optimizer)
        scheduler = LambdaLR(optimizer, self._multiplier)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _multiplier(self, step: int) -> float:
        plan = self._data.plan
        task, within = plan.locate_step(step)
        return self.schedule.multiplier(within, plan.steps[task])

    @property
    def _data(self) -> SequenceDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """Cross-entropy of the answers, normalised by the tokens of the whole window over all ranks; nothing, for a
        step without gradients, while a strategy lets the task pass."""
        strategies = strategies_of(self.trainer)
        if any(strategy.skipping for strategy in strategies):
            if self.trainer.world_size == 1:
                return None
            # Ranks must all reduce: gradients of zero, which the strategy takes away before the optimizer sees them.
            return torch.stack([p.sum() for p in self.adapters.trainable_parameters()]).sum() * 0.0
        found = [strategy.rows_beside(self.trainer, self, batch, batch_idx) for strategy in strategies]
        beside = next((rows for rows in found if rows is not None), None)  # one strategy replays at most
        joint = None if beside is None else join(batch, beside, pad_id(self.tokenizer))
        if beside is not None and most(joint is None, self.model):  # apart on one rank: apart on all
            joint = None
        sizes = [len(rows["input_ids"]) for rows in ((batch, beside) if beside and joint else (batch,))]
        with ExitStack() as stack:
            for strategy in strategies:
                stack.enter_context(strategy.watching(self))
            needed = any(strategy.needs_logits for strategy in strategies)
            losses, logits = self._losses(joint or batch, sizes, needed)
        total = losses[0]
        # Lightning divides by the micro-batches and DDP by the ranks: undo both, the window's count replaces them.
        share = self.trainer.accumulate_grad_batches * self.trainer.world_size / batch["window_tokens"]
        loss = total * share
        if batch_idx % self._data.plan.accumulate == 0:
            self._window = {}
        self.log_share("train/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]), sync_dist=True)
        self.log("train/padding_efficiency", batch["padding_efficiency"], batch_size=len(batch["input_ids"]))
        passed: dict[str, Any] = {} if joint is None else {"beside_loss": losses[1]}
        if logits is not None:
            passed["logits"] = logits[: sizes[0], : batch["input_ids"].shape[1]]
        batch = {**batch, **passed}  # a copy: Lightning keeps the batch itself until the step is over
        for strategy in strategies:
            loss = strategy.shape_loss(self.trainer, self, loss, batch, batch_idx)
        return loss

    def log_share(self, name: str, share: Tensor, **how: Any) -> None:
        """Log a value that every micro-batch of a window has a share of, as a whole at the window's end.

        Args:
            name: Its name.
            share: Scalar; the window's value is the mean of these over its micro-batches.
            **how: What Lightning's ``log`` takes.
        """
        so_far = self._window.get(name)
        self._window[name] = share.detach() if so_far is None else so_far + share.detach()
        self.log(name, self._window[name] / self._data.plan.accumulate, **how)

    def _losses(
        self, batch: dict[str, Any], sizes: list[int], needed: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Summed cross-entropy of each part of a batch, whose parts have ``sizes`` rows; the logits, where needed."""
        if self._chunked is not None and not needed:
            return self._chunked.by_part(packed_inputs(batch), batch["labels"], sizes), None
        logits, labels = self.logits(batch), batch["labels"]
        parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
        return [summed_cross_entropy(part, wanted) for part, wanted in parts], logits if needed else None

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """The model's logits for a batch, ``[b, t, v]``."""
        return self.model(**packed_inputs(batch)).logits

    def answer_loss(self, batch: dict[str, Any]) -> Tensor:
        """Summed cross-entropy of a batch's trained tokens, a scalar."""
        return self._losses(batch, [len(batch["labels"])])[0][0]

    def on_fit_start(self) -> None:
        """Calibrate what starts from calibration text, unless a checkpoint brought the start (it is loaded by now), and
        make sure that packed rows stay apart."""
        if isinstance(self.calibration, TaskCalibration):
            self._data.render(self.calibration.task)
        calibrate(self.adapters, self.tokenizer, self.calibration, self.base_fingerprint, self.seed)
        with self.trainer.precision_plugin.forward_context():
            self._chunked = choose_loss(self.model, self.chunked_loss)
        if self._data.packing:
            check_packing(self.model)

    def on_train_start(self) -> None:
        """Put back the random state of the checkpoint, after everything that start-up drew."""
        if self._restored_rng is not None:
            rng.restore(self._restored_rng, self.global_rank)
            self._restored_rng = None

    def on_task_start(self, index: int) -> None:
        """Restart the optimizer for the task that begins."""
        if self.reset_optimizer and index > 0:
            self._torch_optimizer().state.clear()

    def on_step_end(self) -> None:
        """Log the task and the learning rate and let the adapters act, after every whole optimizer step."""
        step = self.trainer.global_step
        self.log("train/task", float(self._data.plan.locate_step(step - 1)[0] + 1), batch_size=1)
        highest = self._torch_optimizer().param_groups[0]["initial_lr"]
        # Not the group's own rate: the scheduler has moved on to the next step's.
        self.log("train/lr", highest * self._multiplier(step - 1), batch_size=1)
        self._settle(self.adapters.after_step(step))

    def on_task_end(self, index: int) -> None:
        """Let the adapters fuse what the task taught them, and make room for the next one."""
        self._settle(self.adapters.end_task())
        if index + 1 < len(self._data.tasks):
            rows, name = self._data.encoded[index], self._data.tasks[index].name
            accumulate(self.adapters, self.tokenizer, rows, name, self.calibration, self.seed)

    def _settle(self, fusion: Fusion) -> None:
        """Forget the moments of tensors that a fusion set back, and log what it did."""
        state = self._torch_optimizer().state
        for parameter in fusion.reset:
            state.pop(parameter, None)
        # Not self.log, which repeats a value at every step that follows it.
        found = {f"telemetry/{name}": float(value) for name, value in fusion.logs.items()}
        log_scalars(self.trainer.loggers, found, self.global_step)

    def _torch_optimizer(self) -> Optimizer:
        return self.optimizers(use_pl_optimizer=False)  # type: ignore[return-value]

    # ------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapters' tensors; never the base."""
        return self.adapters.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:  # type: ignore[override]
        """Load the adapters' tensors; every key and shape must match, whatever ``strict`` says."""
        return self.adapters.load_state_dict(state_dict)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with before its tensors mean anything here."""
        return {
            "base": self.spec.identity(),
            "base_fingerprint": self.base_fingerprint,
            "adapter": describe_adapter(self.adapter),
            "calibration": self.calibration.settings() if self.adapter.needs_calibration else {},
            "optimizer": describe_optimizer(self.optimizer),
            "schedule": {**asdict(self.schedule), "reset_optimizer": self.reset_optimizer},
            "seed": self.seed,
        }

    def describe(self) -> dict[str, Any]:
        """What a reader of the results needs to know about the model."""
        trained = sum(p.numel() for p in self.adapters.trainable_parameters())
        started = {} if self.start is None else {"start": self.start}
        return {**self.identity(), **started, "trainable_parameters": trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the tensors are relative to, and the random state of every rank."""
        checkpoint["secura"] = {"version": __version__, **self.identity()}
        checkpoint["strategies"] = describe(strategies_of(self.trainer))
        checkpoint["rng"] = rng.capture()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, another adapter or other strategies.

        Raises:
            SecuraError: It was not written by this program, or belongs to another base, adapter or strategy.
        """
        then = checkpoint.get("secura")
        if not isinstance(then, dict):
            raise SecuraError("--ckpt_path: not a checkpoint of secura_lightning (no adapter identity inside)")
        check_identity(then, self.identity())
        check_resumed(checkpoint.get("strategies", {}), describe(strategies_of(self.trainer)))
        data, now = checkpoint.get(type(self._data).__qualname__, {}), self._data.plan.accumulate
        recount(checkpoint, data.get("accumulate", now), now)
        self._restored_rng = checkpoint.get("rng")
