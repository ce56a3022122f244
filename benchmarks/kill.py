"""Kill training runs without warning, resume them, and compare with runs that nobody touched.

    python -m benchmarks.kill --kills 50 [--quick] [--json kills.json]

Every run is a real `secura fit` process on the pocket model that gets SIGKILL at a drawn moment: after a step (the
first and last of a task among them), during an evaluation (the report's or the guard's), while a checkpoint is half
written, or at any time: a drawn part of a second after a step began, whatever it does then. It is resumed with
`--ckpt_path last`, usually to be killed again, and once it ends its adapter tensors, optimizer and strategy states,
random state and continual.json (times aside) must equal those of the uninterrupted run, bit for bit.

The processes are forked from one that has imported everything, because that takes longer than such a run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks._common import Row

STEPS = [4, 3, 4]
CONFIG: dict[str, Any] = {
    "seed_everything": 11,
    "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1},
    "model": {
        "base": "pocket",
        "adapter": {
            "class_path": "LoRAConfig",
            "init_args": {"rank": 4, "dropout": 0.1, "targets": ["q_proj", "v_proj", "down_proj"]},
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    },
    "data": {
        "tasks": ["PocketArithmetic", "PocketLogic", "PocketDigest"],
        "probe": "PocketProbe",
        "batch_size": 2,
        "max_length": 96,
        "steps_per_task": STEPS,
    },
    "forgetting": {"limit": 2, "samples": 0},
    "checkpoint": {"every_n_steps": 2},
}
EWC: dict[str, Any] = {"class_path": "EWC", "init_args": {"ewc_lambda": 10.0, "samples": 8}}
GUARD: dict[str, Any] = {"class_path": "RetentionGuard", "init_args": {"floor": 0.9, "every_n_steps": 1, "limit": 8}}
BUFFER: dict[str, Any] = {"class_path": "ReplayBuffer", "init_args": {"capacity": 6, "on_disk": True}}
STRATEGIES: dict[str, list[Any]] = {
    "ER+EWC": [{"class_path": "ER"}, EWC],
    "ILoRA": [{"class_path": "ILoRA"}],
    "EWC": [EWC],
    "ER on disk": [BUFFER, {"class_path": "ER"}],
    "guard stop": [GUARD],
    "guard dial": [{**GUARD, "init_args": {**GUARD["init_args"], "policy": "dial", "bisections": 2}}],
    "ER": [{"class_path": "ER"}],
    "DERPP": [{"class_path": "DERPP"}],
    "AGEM": [{"class_path": "AGEM"}],
    "LwF": [{"class_path": "LwF"}],
    "L2SP": [{"class_path": "L2SP"}],
}
MOMENTS = ("step", "evaluation", "checkpoint", "any")
PASSING = {"elapsed", "wall_time", "git_commit"}  # times, and what a commit in between changes


class Killer(Callback):
    """Ends its own process, as the kernel would when memory runs out.

    Args:
        step: Optimizer steps after which it strikes.
        moment: ``step``: as that step is over; ``evaluation``: in the midst of the next one; ``checkpoint``: with half
            of the next one on disk; ``any``: ``delay`` after that step began, from another thread.
        delay: Seconds.
    """

    def __init__(self, step: int, moment: str, delay: float = 0.0) -> None:
        self.step = step
        self.moment = moment
        self.delay = delay
        self._timed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand where an evaluation or a checkpoint must pass."""
        if self.moment == "checkpoint":
            save = trainer.save_checkpoint

            def half(path: Any, *args: Any, **kwargs: Any) -> None:
                save(path, *args, **kwargs)
                if trainer.global_step >= self.step:
                    os.truncate(path, Path(path).stat().st_size // 2)
                    strike()

            trainer.save_checkpoint = half  # type: ignore[method-assign, assignment]
        elif self.moment == "evaluation":
            from secura_lightning.callbacks import forgetting
            from secura_lightning.strategies import guard

            evaluate = forgetting.evaluate_probe

            def late(*args: Any, **kwargs: Any) -> Any:
                result = evaluate(*args, **kwargs)
                if trainer.global_step >= self.step:
                    strike()
                return result

            forgetting.evaluate_probe = guard.evaluate_probe = late

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Set the clock that strikes at any time."""
        if self.moment == "any" and not self._timed and trainer.global_step + 1 >= self.step:
            self._timed = True
            timer = threading.Timer(self.delay, strike)
            timer.daemon = True  # a run that ends first is not waited for
            timer.start()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Strike after a step, before anything is saved."""
        if self.moment == "step" and trainer.global_step >= self.step:
            strike()


def strike() -> None:
    """SIGKILL: nothing that is only in memory survives."""
    os.kill(os.getpid(), signal.SIGKILL)


def _processes() -> Any:
    """Where processes are forked from: a server of its own that has imported the command, and holds no model."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["secura_lightning.cli.fit"])
    return found


def _secura(arguments: list[str], log: str) -> None:
    """What a process does: the command, with its output in a file."""
    from secura_lightning.cli.main import main as secura

    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(secura(arguments))


class Runs:
    """Runs of one strategy under one folder."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root / name.replace("+", "_").replace(" ", "_")
        self.root.mkdir(parents=True)
        self.config = json.loads(json.dumps(CONFIG))
        self.config["trainer"]["callbacks"] = STRATEGIES[name]

    def fit(self, name: str, killer: Killer | None = None) -> int:
        """Start a run or resume it from its last checkpoint, in a process of its own; the exit status."""
        config = json.loads(json.dumps({**self.config, "name": name}))
        if killer is not None:
            arguments = {"step": killer.step, "moment": killer.moment, "delay": killer.delay}
            config["trainer"]["callbacks"].append({"class_path": "benchmarks.kill.Killer", "init_args": arguments})
        file = self.root / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        command = ["fit", "--config", str(file), "--save_dir", str(self.root)]
        if list((self.root / name).glob("version_*/checkpoints/last.ckpt")):
            command += ["--ckpt_path", "last"]
        log = self.root / f"{name}.log"
        process = _processes().Process(target=_secura, args=(command, str(log)))
        process.start()
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            told = log.read_text(encoding="utf-8")[-3000:]
            raise RuntimeError(f"secura fit failed after {killer and (killer.step, killer.moment)}:\n{told}")
        return process.exitcode

    def result(self, name: str) -> dict[str, Any]:
        """What must be equal: the last checkpoint and the report."""
        folder = max((self.root / name).glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
        checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        kept = ("state_dict", "optimizer_states", "lr_schedulers", "rng", "callbacks", "global_step")
        report = json.loads((folder / "continual.json").read_text())
        content = {key: checkpoint[key] for key in kept}
        content["callbacks"] = {k: v for k, v in content["callbacks"].items() if not k.startswith("Throughput")}
        return {**content, "report": report}


def differences(left: Any, right: Any, where: str = "") -> Iterator[str]:
    """Where two results differ in structure or in any bit, times aside."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in {*left, *right} - PASSING:
            if key not in left or key not in right:
                yield f"{where}.{key} is missing on one side"
            else:
                yield from differences(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from differences(one, other, f"{where}[{i}]")
    elif isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if not torch.equal(left, right):
            yield where
    elif left != right and not (left != left and right != right):  # NaN equals NaN
        yield f"{where}: {left!r} != {right!r}"


def schedule(generator: random.Random, kills: int) -> list[Killer]:
    """Moments of one run in the order in which they come, first and last steps of tasks drawn more often.

    Step 0 is before the first one: the untouched base is evaluated there.
    """
    total = sum(STEPS)
    ends = [sum(STEPS[: i + 1]) for i in range(len(STEPS))]
    edges = sorted({1, *ends, *(end + 1 for end in ends[:-1])})
    moments = []
    for _ in range(kills):
        moment = generator.choice(MOMENTS)
        first = 0 if moment == "evaluation" else 1
        step = generator.choice(edges) if generator.random() < 0.5 else generator.randint(first, total)
        moments.append(Killer(step, moment, round(generator.uniform(0, 1.5), 3)))
    return sorted(moments, key=lambda killer: killer.step)


def soak(root: Path, kills: int, per_run: int, names: list[str], seed: int) -> dict[str, Any]:
    """Kill runs of the strategies in turn until ``kills`` kills have struck."""
    generator = random.Random(seed)
    runs = {name: Runs(root, name) for name in names}
    whole: dict[str, Any] = {}
    survived, found, log = 0, [], []
    turn = 0
    while survived < kills:
        name = names[turn % len(names)]
        mine = runs[name]
        if name not in whole:
            mine.fit("whole")
            whole[name] = mine.result("whole")
        run = f"killed{turn}"
        struck = []
        for killer in schedule(generator, min(per_run, kills - survived)):
            if mine.fit(run, killer) == 0:
                break  # it had passed that moment
            struck.append((killer.moment, killer.step))
        else:
            mine.fit(run)
        survived += len(struck)
        here = [f"{name}/{run}{difference}" for difference in differences(mine.result(run), whole[name])]
        found += here
        log.append({"strategy": name, "kills": struck, "differences": here})
        print(f"{name:<11} killed {', '.join(f'{m}@{s}' for m, s in struck)}: {len(here)} differences", flush=True)
        turn += 1
    return {"kills": survived, "runs": turn, "differences": found, "log": log}


def main(arguments: list[str] | None = None) -> int:
    """Run the soak; the exit status is 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many (50)")
    parser.add_argument("--per-run", type=int, default=4, help="most kills of one run (4)")
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="these strategies")
    parser.add_argument("--quick", action="store_true", help="3 kills of EWC alone")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (0)")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.kills, options.only, options.per_run = min(options.kills, 3), ["EWC"], 3
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), options.kills, options.per_run, options.only, options.seed)
    for difference in result["differences"][:20]:
        print(f"differs: {difference}")
    print(f"{result['kills']} kills survived in {result['runs']} runs, {len(result['differences'])} differences")
    if options.json:
        kills, wanted, differences = result["kills"], options.kills, len(result["differences"])
        rows = [
            Row("kills survived", kills, "kills", wanted, kills / wanted, ">= 1.00", kills >= wanted),
            Row("differences", differences, "kills", kills, differences / max(kills, 1), "<= 0.00", not differences),
        ]
        content = {"rows": [asdict(row) for row in rows], **result}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if result["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
