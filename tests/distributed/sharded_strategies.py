"""One process of two, started by torchrun: every strategy on a whole base (DDP), on a sharded one, and there resumed.

``python -m tests.distributed.sharded_strategies FOLDER BASE`` leaves one file for each of :data:`SCENARIOS` in FOLDER,
with what each of the three runs ended in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from secura_lightning import module
from secura_lightning.adapters import FullConfig, LoRAConfig, SECURAConfig
from secura_lightning.adapters.numerics import gathered
from secura_lightning.data.probe import Probe
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split
from secura_lightning.engine import ShardedStrategy
from secura_lightning.modeling.calibrate import Calibration, SelfCalibration
from secura_lightning.modeling.shard import is_sharded
from secura_lightning.strategies import joint
from secura_lightning.strategies.agem import AGEM
from secura_lightning.strategies.base import Strategy, strategies_of
from secura_lightning.strategies.buffer import ReplayBuffer
from secura_lightning.strategies.derpp import DERPP
from secura_lightning.strategies.er import ER
from secura_lightning.strategies.ewc import EWC
from secura_lightning.strategies.guard import RetentionGuard
from secura_lightning.strategies.ilora import ILoRA
from secura_lightning.strategies.l2sp import L2SP
from secura_lightning.strategies.lwf import LwF
from tests.distributed.callbacks import SameEverywhere
from tests.strategies.tiny import fit
from tests.tiny import TinyTask

ACCUMULATE = 2
SAVED_AT = 3  # steps: in the middle of the second task
TARGETS = ["q_proj", "down_proj"]
DENSE = SECURAConfig(c=8, a=12, norm="element", fusion="base", targets=TARGETS)
THRIFTY = {"activation_checkpointing": True, "chunked_loss": True}
UNEVEN = (11, 7, 9)  # rows of the three tasks; a window has 8
TWO_ROWS = (2, 7, 9)  # the first process gets both


class Contrary(TinyTask):
    """The first task's prompts with another answer, so that what it teaches works against what the first taught."""

    def load(self, split: Split) -> list[Row]:
        return [Row(row.id, row.prompt.replace(self.name, "first"), "zzzz") for row in super().load(split)]


class Strange(Probe):
    """Choices between answers of the tasks and others, which training makes less likely."""

    def __init__(self) -> None:
        super().__init__("strange")

    def rows(self) -> list[Row]:
        others = ("QXK", "KJWV", "WVQX", "ZQX", "JJK", "XKQW", "VQXW", "WWK")
        pairs = zip(others, ("red", "blue", "zzzz", "dog") * 2, strict=True)
        return [Row(str(i), f"first {i}: {one}", one, (one, other), "choice") for i, (one, other) in enumerate(pairs)]

    def texts(self) -> list[str]:
        return []


def buffer() -> ReplayBuffer:
    return ReplayBuffer(capacity=5)


def ewc(samples: int = 7, base_text: Calibration | None = None) -> EWC:
    return EWC(0.1, samples, base_text=base_text, batch_size=2)  # by default 4 rows on one rank and 3 on the other


def guard(policy: Any, floor: float) -> RetentionGuard:
    return RetentionGuard(floor, policy, every_n_steps=1, watch=Strange(), bisections=3)


Scenario = tuple[Callable[[], Sequence[Strategy]], dict[str, Any], tuple[int, ...]]
# strategies, settings of the module, and the tasks with their rows
SCENARIOS: dict[str, Scenario] = {
    "none": (list, {}, UNEVEN),
    "ER": (lambda: [buffer(), ER(0.4)], {}, UNEVEN),
    "ER, nothing on one rank": (lambda: [buffer(), ER()], {}, TWO_ROWS),
    "ILoRA": (lambda: [buffer(), ILoRA(decay=0.6)], {}, UNEVEN),
    "ILoRA, nothing on one rank": (lambda: [buffer(), ILoRA(decay=0.6)], {}, TWO_ROWS),
    "ILoRA, all layers": (lambda: [buffer(), ILoRA(decay=0.6, layers="all")], {}, UNEVEN),
    "ILoRA, logits": (lambda: [buffer(), ILoRA(decay=0.6, layers="logits")], {}, UNEVEN),
    "DERPP": (lambda: [buffer(), DERPP()], {}, UNEVEN),
    "DERPP, nothing on one rank": (lambda: [buffer(), DERPP()], {}, TWO_ROWS),
    "AGEM": (lambda: [buffer(), L2SP(1.0), AGEM(5)], {}, UNEVEN),
    "AGEM, nothing on one rank": (lambda: [buffer(), AGEM(5)], {}, TWO_ROWS),
    "ER, full fine-tuning": (lambda: [buffer(), ER(0.4)], {"adapter": FullConfig(targets=TARGETS)}, UNEVEN),
    "DERPP, full fine-tuning": (lambda: [buffer(), DERPP()], {"adapter": FullConfig(targets=TARGETS)}, TWO_ROWS),
    "EWC": (lambda: [ewc()], {}, UNEVEN),
    "EWC, less than a row a rank": (
        lambda: [ewc(1, SelfCalibration(samples=3, max_length=12, batch_size=2, cache=None))],
        {},
        UNEVEN,
    ),
    "EWC, dense change": (lambda: [ewc()], {"adapter": DENSE}, UNEVEN),
    "LwF": (lambda: [LwF()], {}, UNEVEN),
    "L2SP": (lambda: [L2SP(1.0)], {}, UNEVEN),
    "RetentionGuard, stop": (lambda: [guard("stop", 0.9)], {}, UNEVEN),
    "RetentionGuard, dial": (lambda: [guard("dial", 0.9)], {}, UNEVEN),
    "all that go together": (
        lambda: [buffer(), guard("dial", 0.9), ER(), LwF(), ewc(), L2SP(0.1), AGEM()],
        {"adapter": DENSE, **THRIFTY},
        UNEVEN,
    ),
    "ILoRA, memory saved": (lambda: [buffer(), ILoRA(decay=0.6), AGEM()], THRIFTY, TWO_ROWS),
}


class Save(Callback):
    """A checkpoint in the middle of a task."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == SAVED_AT * ACCUMULATE:
            trainer.save_checkpoint(self.path)


class Decisions:
    """Whether fresh and replayed rows could have gone together, as this rank alone saw it."""

    def __init__(self) -> None:
        self.alone: list[bool] = []

    def __call__(self, *args: Any) -> dict[str, Tensor] | None:
        found = joint.join(*args)
        self.alone.append(found is None)
        return found


def run(root: Path, base: str, name: str, sharded: bool, saved: Path, resume: bool = False) -> dict[str, Any]:
    """What a run ends in, on every rank."""
    strategies, settings, tasks = SCENARIOS[name]
    module.join = decisions = Decisions()
    trainer = fit(
        root,
        [*strategies(), SameEverywhere(), *([] if resume else [Save(saved)])],
        str(saved) if resume else None,
        adapter=settings.get("adapter", LoRAConfig(rank=2, targets=TARGETS)),
        model={
            "base": base,
            "dtype": "float64",
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
            **{key: value for key, value in settings.items() if key != "adapter"},
        },
        data={
            "tasks": [TinyTask("first", tasks[0]), Contrary("second", tasks[1]), TinyTask("third", tasks[2])],
            "batch_size": 2,
            "steps_per_task": [2, 2, 2],
        },
        devices=2,
        strategy=ShardedStrategy() if sharded else "ddp",
        accumulate_grad_batches=ACCUMULATE,
    )
    assert is_sharded(trainer.lightning_module.model) == sharded
    every: list[Any] = [None, None]
    dist.all_gather_object(every, decisions.alone)
    return {
        "tensors": {key: gathered(value).clone() for key, value in trainer.lightning_module.state_dict().items()},
        "strategies": {type(one).__name__: one.state_dict() for one in strategies_of(trainer)},
        "apart": every,
    }


def main(root: Path, base: str) -> int:
    """All scenarios."""
    joint._SPARE, joint._SHARE = 10, 1000  # so that ranks differ in whether rows go together
    for number, name in enumerate(SCENARIOS):
        saved = root / f"{number}.ckpt"
        whole = run(root, base, name, False, saved)
        sharded = run(root, base, name, True, saved)
        resumed = run(root, base, name, True, saved, resume=True)
        if dist.get_rank() == 0:
            torch.save({"whole": whole, "sharded": sharded, "resumed": resumed}, root / f"{name}.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
