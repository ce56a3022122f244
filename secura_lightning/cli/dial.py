"""``secura dial``: how much of a finished run's change can be kept under a promise on base knowledge.

The adapter is moved along the straight path from the untouched base (or an earlier checkpoint of the run) to the
finished state, theta(t) = theta_0 + t (theta_1 - theta_0), and tasks and base-knowledge probe are scored at points of
it. The path runs through the adapter's anchors: from the base, B of LoRA and its kin shrinks while A stays, so that the
change before the norm is t times the whole; SECURA's K_L + A B and CURLoRA's U shrink alike; full fine-tuning
interpolates weights. The largest scale that keeps the floor is found among the points, then by bisection above it.
Scores come as the run took them, with its ``forgetting.split``, ``limit`` and ``normalise``, under its
``trainer.precision``.

It chooses by the whole probe, and reports on it too: score a probe of your own to check the promise elsewhere.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from secura_lightning.adapters import AdapterSet
from secura_lightning.callbacks.checkpoint import LAST
from secura_lightning.cli.checkpoints import load_weights, read_checkpoint, rebuild
from secura_lightning.cli.dial_report import draw, save_json, table
from secura_lightning.cli.fit import parse, quiet
from secura_lightning.cli.inspect import InspectCLI
from secura_lightning.cli.options import OneLineOptions, place
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.data.task import Split
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.evaluation.evaluate import ProbeScore, evaluate_probe, evaluate_task
from secura_lightning.modeling.load import load_tokenizer
from secura_lightning.modeling.precision import autocast
from secura_lightning.strategies.guard import move
from secura_lightning.strategies.memory import Memory
from secura_lightning.strategies.watch import retention

_BISECTIONS = 5
EPILOG = """examples:
  secura dial --ckpt lightning_logs/quickstart/version_0 --retention 0.95
  secura dial --ckpt RUN/checkpoints/task2-logic.ckpt --start RUN/checkpoints/task1-arithmetic.ckpt --out dialled
  secura merge --ckpt dialled/dialled.ckpt --out merged
"""


def main(args: list[str]) -> int:
    """Sweep the path, print and draw it, and write the dialled adapter.

    Raises:
        ConfigError: The command line is wrong, or the run has no probe.
        SecuraError: The run or its configuration cannot be read.
    """
    quiet()
    options = _options(args)
    file = _checkpoint_of(options.ckpt, "--ckpt")
    run = file.parent.parent
    config = options.config or run / "config.yaml"
    if not config.is_file():
        raise SecuraError(f"--ckpt: no {config} beside the checkpoint; give the run's configuration with --config")
    cli = parse(InspectCLI, ["--config", str(config)])
    if cli.datamodule.probe is None:
        raise ConfigError("data.probe: the run has no probe to measure retention by; give a --config with one")
    forgetting = cli.config["forgetting"]
    limit = options.limit if options.limit is not None else forgetting["limit"]

    spec, model, adapters = rebuild(file, options.weights)
    model, tokenizer = place(model, spec), load_tokenizer(spec)
    path = ChangePath(adapters, file, options.start and _checkpoint_of(options.start, "--start"), options.weights)
    scoring = Scoring(forgetting["split"], limit, options.batch_size, forgetting["normalise"])
    scorer = _Scorer(model, tokenizer, cli.datamodule, scoring)
    with autocast(cli.config["trainer"]["precision"], next(model.parameters()).device.type):
        result = sweep(path, scorer, options.retention, options.points)
    print(f"\n{table(result)}\n")
    out = options.out or run / "dial"
    out.mkdir(parents=True, exist_ok=True)
    save_json(result, out / "dial.json")
    draw(result, out / "dial.png")
    path.go(result["chosen"]["scale"])
    _save_adapter(adapters, file, result["chosen"]["scale"], out / "dialled.ckpt")
    print(f"wrote {out}: dial.png, dial.json and dialled.ckpt, which `secura merge --ckpt` accepts")
    return 0


def _options(args: list[str]) -> argparse.Namespace:
    parser = OneLineOptions(prog="secura dial", description=__doc__, epilog=EPILOG)
    parser.add_argument("--ckpt", type=Path, required=True, help="folder of a finished run, or a checkpoint file of it")
    parser.add_argument("--retention", type=float, default=0.95, help="floor on retained base knowledge (0.95)")
    parser.add_argument("--points", type=int, default=11, help="points of the sweep, both ends included (11)")
    parser.add_argument("--start", type=Path, help="where the path begins: an earlier checkpoint (default: the base)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: `dial` in the run's folder)")
    parser.add_argument("--config", type=Path, help="configuration with tasks and probe (default: the run's own)")
    parser.add_argument("--limit", type=int, help="rows of each task and of the probe (default: forgetting.limit)")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences computed together (64)")
    parser.add_argument(
        "--weights", choices=("long_term", "working"), help="memory of an I-LoRA run (default: the one that was judged)"
    )
    options = parser.parse_args(args)
    if not 0 < options.retention <= 1:
        raise ConfigError(f"--retention is {options.retention}; it must be above 0 and at most 1")
    for key, least in (("points", 2), ("limit", 1), ("batch_size", 1)):
        value = getattr(options, key)
        if value is not None and value < least:
            raise ConfigError(f"--{key.replace('_', '-')} is {value}; it must be at least {least}")
    return options


def _checkpoint_of(path: Path, option: str) -> Path:
    """The file itself, or a run's last checkpoint.

    Raises:
        SecuraError: There is none.
    """
    file = path / "checkpoints" / LAST if path.is_dir() else path
    if not file.is_file():
        raise SecuraError(f"{option}: no checkpoint at {file}; give a run's folder (version_N) or a checkpoint file")
    return file


class ChangePath:
    """Moves adapters along the straight way between two states.

    Args:
        adapters: Adapters that hold the end.
        end: Checkpoint of the end.
        start: Checkpoint of the start; None for the untouched base.
        weights: Memory of an I-LoRA run that counts.
    """

    def __init__(self, adapters: AdapterSet, end: Path, start: Path | None, weights: Any = None) -> None:
        self.adapters = adapters
        self.end: dict[str, Tensor] = Memory(adapters).values
        if start is None:
            for layer in adapters.layers.values():
                layer.set_anchors(layer.untouched())
        else:
            if adapters.config.accumulates:
                raise ConfigError(
                    f"--start: {type(adapters.config).__name__} takes new coordinates for every task, so no straight "
                    "path leads from one to another: leave --start out, and the path begins at the base"
                )
            load_weights(adapters, start, weights)
        self.start: dict[str, Tensor] = Memory(adapters).values
        load_weights(adapters, end, weights)  # what no anchor tells stays as it is at the end

    def go(self, scale: float) -> None:
        """Move to ``start + scale (end - start)``."""
        move(self.adapters, self.start, self.end, scale)


@dataclass(frozen=True)
class Scoring:
    """How a run's scores are taken; see :class:`~secura_lightning.callbacks.forgetting.ForgettingMonitor`."""

    split: Split
    limit: int | None
    batch_size: int
    normalise: bool


class _Scorer:
    """Scores a model on a run's tasks and probe."""

    def __init__(self, model: Any, tokenizer: Any, data: SequenceDataModule, how: Scoring) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.data = data
        self.how = how

    def tasks(self) -> dict[str, float]:
        """Score of every task by name."""
        how = self.how
        rest = (how.split, how.limit, how.batch_size, how.normalise)
        scores = [evaluate_task(self.model, self.tokenizer, task, *rest) for task in self.data.tasks]
        return {score.task: score.value for score in scores}

    def probe(self) -> ProbeScore:
        """Score of the probe."""
        assert self.data.probe is not None
        rest = (self.how.limit, self.how.batch_size, self.how.normalise)
        return evaluate_probe(self.model, self.tokenizer, self.data.probe, *rest)


def sweep(path: ChangePath, scorer: _Scorer, floor: float, points: int) -> dict[str, Any]:
    """Score evenly spaced points of the path, and find the largest scale that keeps the floor.

    Args:
        path: The path.
        scorer: What is scored.
        floor: Least retention.
        points: How many, both ends included.

    Returns:
        ``floor``; ``points`` and ``chosen``, each point with ``scale``, ``tasks``, ``mean``, ``retention``, ``kinds``
        and ``perplexity``; ``kept``, whether the chosen one keeps the floor (not even the start may).
    """
    with path.adapters.disabled():
        base = scorer.probe()

    def measure(scale: float) -> dict[str, Any]:
        path.go(scale)
        now, tasks = scorer.probe(), scorer.tasks()
        mean = sum(tasks.values()) / len(tasks)
        kept = retention(now, base)
        return {
            "scale": scale, "tasks": tasks, "mean": mean, "retention": kept, "kinds": now.kinds,
            "perplexity": now.perplexity,
        }  # fmt: skip

    scales = [i / (points - 1) for i in range(points)]
    found = [measure(scale) for scale in tqdm(scales, desc="dial", leave=False, disable=None)]
    keeping = [point["scale"] for point in found if point["retention"] >= floor]
    low = max(keeping, default=0.0)
    if low < 1 and keeping:
        low = _bisect(
            low, min(scale for scale in scales if scale > low), lambda t: _keeps(path, scorer, base, floor, t)
        )
    chosen = next((point for point in found if point["scale"] == low), None) or measure(low)
    return {"floor": floor, "points": found, "chosen": chosen, "kept": chosen["retention"] >= floor}


def _keeps(path: ChangePath, scorer: _Scorer, base: ProbeScore, floor: float, scale: float) -> bool:
    path.go(scale)
    return retention(scorer.probe(), base) >= floor


def _bisect(low: float, high: float, good: Callable[[float], bool]) -> float:
    """The largest good number found between a good and a bad one."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def _save_adapter(adapters: AdapterSet, source: Path, scale: float, target: Path) -> None:
    """Write the adapters as they are, as a checkpoint without anything to resume from."""
    state = {name: value.cpu().clone() for name, value in adapters.state_dict().items()}
    identity = read_checkpoint(source)["secura"]
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    torch.save({"secura": identity, "state_dict": state, "dial": {"source": str(source), "scale": scale}}, beside)
    os.replace(beside, target)
