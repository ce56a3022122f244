"""Whole-model training: tokens per second and peak memory, ours against Hugging Face Trainer + peft.

Run:    OMP_NUM_THREADS=1 python -m benchmarks.train --json train.json
Quick:  OMP_NUM_THREADS=1 python -m benchmarks.train --quick

The same random Llama, rows in the same batches, rank, AdamW and precision; each side with its own training loop: the
module, callbacks and data module of `secura fit` under Lightning (no evaluation, no checkpoint), transformers' Trainer
around peft's model. A step counts from the end of the one before it, so loading and the first step are left out. The
two sides of a comparison train at the same time and take turns, a step each: what slows the machine for some seconds
slows both, and a ratio is the median over pairs of neighbouring steps. On a CPU with one thread the time is this
process' CPU time.

Peak memory is the growth of a process' resident memory from before the model is built to its largest, each contender in
a process of its own (``max_memory_allocated`` on a GPU).
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers import Trainer as PeerTrainer

from benchmarks._common import Row, Spread, clock, compare, finish, parser, tabulate
from secura_lightning.adapters import AdapterConfig, LoRAConfig, SECURAConfig
from secura_lightning.callbacks.failures import FailureGuard
from secura_lightning.callbacks.throughput import Throughput
from secura_lightning.data.encode import Encoded, collate
from secura_lightning.data.rows import Row as DataRow
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.data.store import EncodedRows
from secura_lightning.data.task import Split, Task
from secura_lightning.module import ContinualModule
from secura_lightning.schedule import Schedule

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
RANK, ALPHA, LR = 8, 16, 1e-4


@dataclass(frozen=True)
class Shape:
    """A model, and what is trained on."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    kv_heads: int | None = None
    rows: int = 4
    length: int = 128
    dtype: str = "float32"

    def save(self, folder: Path) -> None:
        """Write the model with random weights, and a tokenizer that is never asked anything."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=False,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(getattr(torch, self.dtype)).save_pretrained(folder)


QUICK = Shape("Llama of 3M parameters on a CPU, fp32", 128, 344, 4, 4, 8192, length=64)
CPU = Shape("Llama of 50M parameters on a CPU, fp32", 512, 1408, 8, 8, 24000)
GPU = Shape("Llama-3.1-8B's shape with 8 layers, bf16", 4096, 14336, 8, 32, 128256, 8, 4, 1024, "bfloat16")


class Rows(Task):
    """Random token rows, encoded already."""

    def __init__(self, shape: Shape, number: int) -> None:
        super().__init__(name="rows", metric="exact")
        generator = torch.Generator().manual_seed(1)
        high = min(shape.vocabulary, 8000)
        ids = torch.randint(3, high, (number, shape.length), generator=generator)
        self.encoded = [Encoded(row.tolist(), 1) for row in ids]

    def load(self, split: Split) -> list[DataRow]:
        """Not asked: the rows are encoded."""
        return []


class Turns:
    """One of several threads works, the others wait."""

    def __init__(self, number: int) -> None:
        self.members = list(range(number))
        self.turn = 0
        self.changed = threading.Condition()

    def wait(self, member: int) -> None:
        """Return when it is this member's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.turn == member)

    def hand_over(self, member: int, leave: bool = False) -> None:
        """Let the next member work."""
        with self.changed:
            self.turn = self.members[(self.members.index(member) + 1) % len(self.members)]
            if leave:
                self.members.remove(member)
            self.changed.notify_all()


class Steps:
    """The time of each step but the first, on this process' clock.

    Args:
        device: Where it is trained.
        pause: Called between two steps, whose time it does not count to.
    """

    def __init__(self, device: str, pause: Callable[[], None] = lambda: None) -> None:
        self.device = device
        self.pause = pause
        timer = clock(device)
        self.now: Callable[[], float] = time.process_time if timer.__name__ == "cpu_seconds" else time.perf_counter
        self.seconds: list[float] = []
        self.start: float | None = None

    def mark(self) -> None:
        """A step is over."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        if self.start is not None:
            self.seconds.append(self.now() - self.start)
        self.pause()
        self.start = self.now()


class Mark(Callback):
    """Marks Lightning's steps; it stands behind all others."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_train_batch_end(self, *_: Any) -> None:
        """A step is over."""
        self.steps.mark()


class PeerMark(TrainerCallback):
    """Marks the peer's steps."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step is over."""
        self.steps.mark()


class InOrder(PeerTrainer):
    """Takes the rows in the order in which they come."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def ours(folder: Path, shape: Shape, adapter: AdapterConfig, number: int, steps: Steps) -> None:
    """Train with this package."""
    task = Rows(shape, shape.rows * number)
    data = SequenceDataModule([task], batch_size=shape.rows, max_length=shape.length, steps_per_task=number)
    module = ContinualModule(
        base=str(folder),
        adapter=adapter,
        dtype=shape.dtype,  # type: ignore[arg-type]
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0),
        schedule=Schedule(kind="constant", warmup=0.0),
    )
    module.__dict__["tokenizer"] = _NoTokenizer()
    data.encoded = [EncodedRows.of(task.encoded)]
    data.plan = _plan(number)
    data.prepare_data = lambda: None  # type: ignore[method-assign]
    trainer = Trainer(
        accelerator="gpu" if steps.device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=[Throughput(), FailureGuard(), Mark(steps)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        precision="bf16-mixed" if shape.dtype == "bfloat16" else "32-true",
    )
    trainer.fit(module, data)


class _NoTokenizer:
    pad_token_id = 0


def _plan(number: int) -> Any:
    from secura_lightning.data.batches import SequencePlan

    return SequencePlan([number])


def peer(folder: Path, shape: Shape, targets: list[str], number: int, steps: Steps) -> None:
    """Train with transformers' Trainer around peft's LoRA."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, shape.dtype))
    model.config.use_cache = False
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=shape.rows,
            max_steps=number,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            optim="adamw_torch",
            bf16=shape.dtype == "bfloat16",
            use_cpu=steps.device == "cpu",
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = InOrder(
            model=wrapped,
            args=arguments,
            train_dataset=Rows(shape, shape.rows * number).encoded,
            data_collator=lambda rows: collate(rows, 0),
            callbacks=[PeerMark(steps)],
        )
        trainer.train()


def secura(targets: list[str]) -> AdapterConfig:
    """SECURA with its default norm, on matrices of its default size."""
    return SECURAConfig(targets=targets, norm="element")


def lora(targets: list[str]) -> AdapterConfig:
    """LoRA of the peer's rank."""
    return LoRAConfig(rank=RANK, alpha=ALPHA, targets=targets)


CONTENDERS: dict[str, Callable[[Path, Shape, int, Steps], None]] = {
    "ours, LoRA": lambda folder, shape, n, steps: ours(folder, shape, lora(LINEARS), n, steps),
    "HF + peft, LoRA": lambda folder, shape, n, steps: peer(folder, shape, LINEARS, n, steps),
    "ours, SECURA element": lambda folder, shape, n, steps: ours(folder, shape, secura(LINEARS), n, steps),
    "ours, LoRA q v": lambda folder, shape, n, steps: ours(folder, shape, lora(QV), n, steps),
    "ours, SECURA element q v": lambda folder, shape, n, steps: ours(folder, shape, secura(QV), n, steps),
}
# ours, what it is compared with, least ratio of tokens a second
TARGETS = [
    ("ours, LoRA", "HF + peft, LoRA", 1.1),
    ("ours, SECURA element", "ours, LoRA", 0.7),
    ("ours, SECURA element q v", "ours, LoRA q v", 0.9),
]


def quiet() -> None:
    """Nothing but the tables."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def side_by_side(names: Sequence[str], folder: Path, shape: Shape, number: int, device: str) -> list[list[float]]:
    """Train contenders at the same time, a step of each in turn.

    Returns:
        The seconds of each one's steps after the first.
    """
    turns = Turns(len(names))

    def train(member: int) -> list[float]:
        def pause() -> None:
            turns.hand_over(member)
            turns.wait(member)

        steps = Steps(device, pause)
        turns.wait(member)
        try:
            CONTENDERS[names[member]](folder, shape, number, steps)
        finally:
            turns.hand_over(member, leave=True)
        return steps.seconds

    with ThreadPoolExecutor(len(names)) as pool, contextlib.redirect_stdout(sys.stderr):
        return list(pool.map(train, range(len(names))))


def times(folder: Path, shape: Shape, number: int, rounds: int, device: str) -> list[Row]:
    """Tokens a second of every contender, against what it is compared with."""
    tokens = shape.rows * shape.length
    rows: list[Row] = []
    table: dict[str, Spread] = {}
    for one, other, least in TARGETS:
        pairs: list[tuple[float, float]] = []
        for turn in range(rounds):
            order = [one, other] if turn % 2 == 0 else [other, one]
            found = dict(zip(order, side_by_side(order, folder, shape, number, device), strict=True))
            pairs += zip(found[one], found[other], strict=True)
        rates = [[tokens / seconds for seconds in column] for column in zip(*pairs, strict=True)]
        table |= {f"{one} | {other}": Spread.of(rates[0]), f"{other} | {one}": Spread.of(rates[1])}
        ratio = statistics.median(theirs / mine for mine, theirs in pairs)
        values = [statistics.median(rate) for rate in rates]
        rows.append(Row(f"{one}, tokens/s", values[0], other, values[1], ratio, f">= {least:.2f}", ratio >= least))
    tabulate(table, "tokens a second")
    return rows


def peak(folder: Path, shape: Shape, name: str, number: int, device: str) -> float:
    """MiB that one contender's training adds to this process."""
    before = _resident("VmRSS")
    with contextlib.redirect_stdout(sys.stderr):
        CONTENDERS[name](folder, shape, number, Steps(device))
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    """MiB of this process' resident memory, now (``VmRSS``) or at most (``VmHWM``).

    Not getrusage's largest, in which a process that another one started begins at the other's size.
    """
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1]) / 1024


def memory(folder: Path, kind: str, names: list[str]) -> dict[str, float]:
    """:func:`peak` of contenders, the median of three processes of their own each."""
    command = [sys.executable, "-m", "benchmarks.train", "--folder", str(folder), "--kind", kind, "--peak"]

    def once(name: str) -> float:
        return float(subprocess.run([*command, name], check=True, stdout=subprocess.PIPE).stdout)

    return {name: statistics.median(once(name) for _ in range(3)) for name in names}


def main() -> None:
    """Measure, compare, print."""
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, help="trainings of each pair (2; 1 with --quick)")
    options.add_argument("--steps", type=int, default=6, help="steps of a training, the first of which is left out")
    options.add_argument("--peak", metavar="NAME", help="print the peak memory of one contender (used by itself)")
    options.add_argument("--folder", type=Path, help="model folder of --peak")
    options.add_argument("--kind", help="shape of --peak")
    chosen = options.parse_args()
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = chosen.kind or ("quick" if chosen.quick else "gpu" if device == "cuda" else "cpu")
    shape = {"quick": QUICK, "cpu": CPU, "gpu": GPU}[kind]
    if chosen.peak:
        print(peak(chosen.folder, shape, chosen.peak, 2, device))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape.save(folder)
        rows = times(folder, shape, chosen.steps, chosen.rounds or (1 if chosen.quick else 2), device)
        one, other = "ours, LoRA", "HF + peft, LoRA"
        peaks = memory(folder, kind, [one, other])
        rows.append(compare(f"{one}, peak MiB", peaks[one], other, peaks[other], 1.0))
    finish(rows, chosen.json, f"Training, {shape.name}")


if __name__ == "__main__":
    main()
