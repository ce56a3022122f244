"""Stands for `secura fit` in tests of what surrounds it: same files, no model. Run as a script.

The configuration's `model.mode` says what to do: `finish`, `fail`, `die`, or `hang` (write a checkpoint, then wait; a
resumed run finishes).
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import yaml


def report(lr: float, seed: int, tasks: list[str], split: str) -> dict[str, object]:
    """A whole run whose scores grow with the learning rate up to 0.01, and fall from there."""
    score = round(0.9 - abs(lr - 0.01) * 20 + 0.01 * seed, 4)
    n = len(tasks)
    matrix = [[score if i < t else 0.1 for i in range(n)] for t in range(n + 1)]
    kinds = {"capital": [1.0] + [score] * n, "past": [0.5] * (n + 1)}
    return {
        "tasks": tasks,
        "matrix": matrix,
        "base_knowledge": {"probe": "p", "accuracy": [0.75] + [0.6] * n, "perplexity": [3.0] + [4.5] * n,
                           "kinds": kinds, "chance": 0.0, "n": 8, "tokens": 10},
        "metrics": {"AP": score, "learning_accuracy": score, "forgetting": 0.0, "base_retention": (score + 1) / 2,
                    "BWT": None},
        "steps": list(range(n + 1)),
        "details": [None] * (n + 1),
        "meta": {"seed": seed, "trainable_parameters": 10, "wall_time": 1.0, "split": split},
    }  # fmt: skip


def write_predictions(folder: Path, report: dict[str, object], seed: int) -> None:
    """Rows whose scores have about the matrix's means, different for every seed."""
    (folder / "predictions").mkdir(exist_ok=True)
    for t, cells in enumerate(report["matrix"]):  # type: ignore[arg-type]
        for task, mean in zip(report["tasks"], cells, strict=True):  # type: ignore[call-overload]
            rows = [{"id": str(i), "kind": "", "score": float((i * 7 + seed) % 20 < 20 * mean)} for i in range(20)]
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / "predictions" / f"row{t}_{task}.jsonl").write_text("".join(lines))


def main(args: list[str]) -> None:
    """Do as the configuration says."""
    config = yaml.safe_load(Path(args[args.index("--config") + 1]).read_text())
    resumed = "--ckpt_path" in args
    mode = config["model"].get("mode", "finish")
    root = Path(config["save_dir"]) / config["name"]
    taken = [int(m[1]) for path in root.glob("version_*") if (m := re.search(r"(\d+)$", path.name))]
    folder = root / f"version_{max(taken, default=-1) + 1}"
    if resumed:
        folder = Path(args[args.index("--ckpt_path") + 1]).parents[1]
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    print(f"threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    if mode == "fail":
        print("some output\nsecura fit: model.adapter.rank is 3000\nTraceback-like noise", file=sys.stderr)
        sys.exit(2)
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "hang" and not resumed:
        (folder / "checkpoints" / "last.ckpt").write_text("step 2")
        time.sleep(60)
    tasks = config["data"]["tasks"]
    seed = config["seed_everything"]
    content = report(config["model"]["optimizer"]["lr"], seed, tasks, config.get("forgetting", {}).get("split", "test"))
    write_predictions(folder, content, seed)
    (folder / "continual.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(sys.argv[1:])
