"""What a strategy costs per optimizer step, as a ratio against the plain sequence.

    python -m benchmarks.strategies [--adapter lora | secura] [--rows 8] [--quick] [--json strategies.json]

All contenders train at the same time in one process, each in its own `trainer.fit` that is let through one step after
another in turn, so that whatever slows the machine slows all of them. On a CPU the seconds are those that the run's own
thread was given, one thread each, so that other programs do not count. Steps are of the second task, where penalties
pull and buffers replay, over rows of one length. Replay processes further sequences, so ER is measured against a plain
run on as many sequences a step, and I-LoRA against one that also runs the long-term memory's forward on half of them.
With few short rows (--quick) what a forward costs whatever its size shows most.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from benchmarks._common import Row, compare, finish, paired, parser, seconds, tabulate
from secura_lightning.adapters import AdapterConfig, LoRAConfig, SECURAConfig
from secura_lightning.data.rows import Row as DataRow
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.data.task import Split, Task
from secura_lightning.module import ContinualModule
from secura_lightning.strategies.base import Strategy
from secura_lightning.strategies.er import ER
from secura_lightning.strategies.ewc import EWC
from secura_lightning.strategies.ilora import ILoRA
from secura_lightning.strategies.l2sp import L2SP


class Text(Task):
    """Documents that are cut into blocks of one length."""

    is_text = True

    def __init__(self, name: str) -> None:
        super().__init__(name, "exact")

    def load(self, split: Split) -> list[DataRow]:
        """Numbers in words enough to fill a few hundred blocks."""
        sentences = "the red dog sees the old house. " * 40
        return [DataRow(f"{split}/{i}", "", f"{self.name} {i}: {sentences}") for i in range(99)]


class ExtraForward(Strategy):
    """A forward without gradient of half of each batch: what the long-term memory of I-LoRA must compute."""

    def shape_loss(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, batch: dict[str, Any], batch_idx: int
    ) -> Tensor:
        """Run it, and leave the loss alone."""
        half = len(batch["input_ids"]) // 2
        model: Any = pl_module.model
        with torch.no_grad():
            model.base_model(input_ids=batch["input_ids"][:half], attention_mask=batch["attention_mask"][:half])
        return loss


class Turnstile(Callback):
    """Holds a run before every batch until it is let through."""

    def __init__(self, free: int) -> None:
        self.free = free  # batches that pass unasked
        self.arrived = threading.Semaphore(0)
        self.open = threading.Semaphore(0)
        self.seconds = 0.0  # from the last opening to the last arrival, of this thread alone
        self._opened = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Wait."""
        if batch_idx >= self.free:
            self.seconds = time.thread_time() - self._opened
            self.arrived.release()
            self.open.acquire()
            self._opened = time.thread_time()


class Contender:
    """A run that takes one step when asked to.

    Args:
        root: Folder for whatever Lightning writes.
        adapter: What it trains.
        strategies: What it trains with.
        batch_size: Rows a step.
        steps: Steps that it can be asked for.
        length: Tokens of a row.
    """

    def __init__(
        self,
        root: str,
        adapter: AdapterConfig,
        strategies: Sequence[Strategy],
        batch_size: int,
        steps: int,
        length: int,
    ) -> None:
        first = 3
        self.gate = Turnstile(first + 1)
        self.failure: BaseException | None = None
        self.module = ContinualModule(
            adapter=adapter, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
        )
        self.data = SequenceDataModule(
            tasks=[Text("first"), Text("second")], batch_size=batch_size, max_length=length,
            steps_per_task=[first, steps + 2], cache=None,
        )  # fmt: skip
        self.trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, default_root_dir=root,
            callbacks=[*strategies, self.gate],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, num_sanity_val_steps=0, log_every_n_steps=10,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._fit, daemon=True)
        self.thread.start()
        self._wait()

    def _fit(self) -> None:
        try:
            self.trainer.fit(self.module, self.data)
        except BaseException as error:
            self.failure = error
        self.gate.arrived.release()

    def _wait(self) -> None:
        self.gate.arrived.acquire()
        if self.failure is not None:
            raise self.failure

    def step(self) -> None:
        """From one batch to the next."""
        self.gate.open.release()
        self._wait()

    def seconds(self) -> float:
        """What a step took: wall time to the end of what it started on a GPU, else time of the run's own thread."""
        if torch.cuda.is_available():
            return seconds(self.step)
        self.step()
        return self.gate.seconds


ADAPTERS: dict[str, AdapterConfig] = {"lora": LoRAConfig(rank=16), "secura": SECURAConfig()}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--adapter", choices=ADAPTERS, default="lora", help="LoRA of rank 16, or SECURA as it ships")
    options.add_argument("--rows", type=int, default=8, help="fresh rows a step (8)")
    return options.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure; the exit status is 1 when a target is missed."""
    options = _options(arguments)
    rows, length, rounds = (2, 32, 12) if options.quick else (options.rows, 128, 30)
    warmup, adapter = 3, ADAPTERS[options.adapter]
    torch.set_num_threads(1)
    made: dict[str, tuple[list[Strategy], int]] = {
        "SEQ": ([], rows),
        "EWC": ([EWC(samples=2 * rows)], rows),
        "L2SP": ([L2SP()], rows),
        "SEQ, twice the rows": ([], 2 * rows),
        "ER": ([ER()], rows),
        "ER + EWC": ([ER(), EWC(samples=2 * rows)], rows),
        "the same + forward": ([ExtraForward()], 2 * rows),
        "ILoRA": ([ILoRA()], rows),
    }
    torch.manual_seed(0)
    with TemporaryDirectory() as root:
        runs = {
            name: Contender(root, adapter, strategies, size, rounds + warmup, length)
            for name, (strategies, size) in made.items()
        }
        found = paired(
            {name: run.seconds for name, run in runs.items()}, rounds, warmup, lambda step: cast(float, step())
        )
    tabulate(found, "seconds a step")
    pairs = [
        ("EWC", "SEQ", 1.05), ("L2SP", "SEQ", None), ("ER", "SEQ, twice the rows", 1.05),
        ("ER + EWC", "SEQ, twice the rows", None), ("ILoRA", "the same + forward", 1.05), ("ER", "SEQ", None),
        ("ILoRA", "SEQ", None),
    ]  # fmt: skip
    table: list[Row] = [
        compare(f"{name} (s/step)", found[name].median, peer, found[peer].median, most) for name, peer, most in pairs
    ]
    finish(
        table, options.json, f"Cost of a strategy per step: pocket, {options.adapter}, {rows} rows of {length} tokens"
    )
    return 0 if all(row.met is not False for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
