"""Two processes on this machine, started by torchrun with a rendezvous on loopback, one thread each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.integration.conftest import TINY, Fit, merged

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# Eight rows a window on the pretrained model in fp64, one step of plain gradient descent after another.
EXACT: dict[str, Any] = {
    "model.init": "pretrained",
    "model.dtype": "float64",
    "model.adapter": {"class_path": "LoRAConfig", "init_args": {"rank": 2, "targets": ["q_proj", "down_proj"]}},
    "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.9}},
    "model.schedule": {"kind": "constant", "warmup": 0.0},
    "data.steps_per_task": [2, 1, 1],
    "forgetting.samples": 0,
}


def write(root: Path, name: str, changes: dict[str, Any]) -> list[str]:
    """Write a configuration; the command line that runs it."""
    config = root / f"{name}.yaml"
    config.write_text(yaml.safe_dump(merged(TINY, {**EXACT, **changes, "name": name})))
    return ["fit", "--config", str(config), "--save_dir", str(root / "runs")]


def finished(root: Path, name: str) -> Fit:
    """The newest run of that name."""
    return Fit(max((root / "runs" / name).glob("version_*")))


def torchrun(arguments: list[str], processes: int = 2, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` in as many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def run_jobs(root: Path, jobs: list[list[str]], processes: int = 2) -> None:
    """Run `secura` command lines one after another in the same processes."""
    file = root / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = torchrun(["-m", "tests.distributed.worker", str(file)], processes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
