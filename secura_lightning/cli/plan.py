"""``secura plan``: how much memory a configuration takes on each device, before anything is loaded."""

from __future__ import annotations

from typing import Any

import torch

from secura_lightning.cli.fit import FitCLI, parse, quiet
from secura_lightning.engine import ShardedStrategy
from secura_lightning.modeling.load import load_config, stored_in
from secura_lightning.modeling.loss import LARGE_VOCABULARY
from secura_lightning.modeling.plan import Memory, Shape, estimate
from secura_lightning.modeling.precision import autocast_type, full_name
from secura_lightning.modeling.shard import check_shardable


class PlanCLI(FitCLI):
    """The parser and objects of ``secura fit`` without a trainer, which may want devices that are not here."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: nothing is trained."""
        return None


def main(args: list[str]) -> int:
    """Print the estimate of a configuration.

    Raises:
        ConfigError: The configuration is wrong, or its parts do not go together.
        SecuraError: The model's configuration cannot be read.
    """
    quiet()
    cli = parse(PlanCLI, args)
    trainer = cli.config_init["trainer"]
    module, data = cli.model, cli.datamodule
    precision = full_name(trainer.get("precision"))
    spec = stored_in(module.spec, precision)
    shards = 1
    if is_sharding(trainer.get("strategy")):
        check_shardable(spec)
        shards = max(1, device_count(trainer.get("devices"))) * int(trainer.get("num_nodes") or 1)
    vocabulary = load_config(spec).get_text_config().vocab_size
    chunked = vocabulary >= LARGE_VOCABULARY if module.chunked_loss is None else module.chunked_loss
    shape = Shape(
        rows=data.batch_size,
        length=data.max_length,
        autocast=autocast_type(precision),
        checkpointing=module.activation_checkpointing,
        chunked=chunked,
        shards=shards,
    )
    memory = estimate(spec, module.adapter, shape, module.optimizer)
    print(table(memory, shape, spec.base))
    return 0


def is_sharding(strategy: Any) -> bool:
    """Whether ``trainer.strategy`` is ours for sharded bases."""
    return isinstance(strategy, ShardedStrategy)


def device_count(devices: Any) -> int:
    """The number of devices on a machine that ``trainer.devices`` means; `auto` is what is here."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices or "auto")
    if text.isdigit():
        return int(text)
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    return len(text.split(","))


def table(memory: Memory, shape: Shape, base: str) -> str:
    """The estimate as lines of text."""
    share = memory.trainable / max(1, memory.parameters + memory.trainable)
    kinds = {
        "base weights": memory.weights,
        "adapters": memory.adapters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "buffers": memory.buffers,
        "activations": memory.activations,
        "logits": memory.logits,
    }
    spread = f", base over {shape.shards} devices" if shape.shards > 1 else ""
    lines = [
        f"{base}: {memory.parameters:,} parameters, {memory.trainable:,} trained ({share:.2%})",
        f"per device, for {shape.rows} rows of {shape.length} tokens{spread}:",
        *(f"  {name:<14}{human(size):>10}" for name, size in kinds.items()),
        f"  {'total':<14}{human(memory.total):>10}",
        *(
            [f"and {human(memory.moments)} of the CPU's memory, and of every checkpoint: moments"]
            if memory.moments
            else []
        ),
        "An estimate: without the kernels' work space, fragments and a GPU's context (about 0.5 GB).",
    ]
    return "\n".join(lines)


def human(size: int) -> str:
    """Bytes as KB, MB or GB of 1024."""
    value = float(size)
    for unit in ("B", "KB", "MB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GB"
