"""A signal to one rank saves on all; a rank that dies or hangs ends the others within the timeout."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import ENVIRONMENT, EXACT, ROOT, finished, torchrun, write
from tests.distributed.test_ddp import TWO, split
from tests.integration.conftest import fit_into

QUICK: dict[str, Any] = {**split(4, 1), "forgetting.limit": 1, "data.probe": None, "data.steps_per_task": [3, 1, 1]}


def signalled(name: str, step: int = 2) -> dict[str, Any]:
    options = {"step": step, "name": name, "rank": 1}
    return {"trainer.callbacks": [{"class_path": "tests.distributed.callbacks.Signal", "init_args": options}]}


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_stops_all(tmp_path: Path) -> None:
    line = write(tmp_path, "stopped", {**TWO, **QUICK, **signalled("SIGUSR1"), "checkpoint.every_n_steps": 100})
    done = torchrun(["-m", "secura_lightning", *line])
    assert done.returncode != 0
    text = "secura fit: saved at step 2 after SIGUSR1; continue with --ckpt_path last"
    assert done.stderr.count(text) == 2, done.stderr[-3000:]
    folder = finished(tmp_path, "stopped").folder
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    # What two ranks left, one goes on with: the same rows a window.
    changes = {**EXACT, **QUICK, **split(8, 1)}
    last = str(folder / "checkpoints" / "last.ckpt")
    resumed, whole = fit_into(tmp_path, changes, ("--ckpt_path", last)), fit_into(tmp_path, changes, folder="whole")
    torch.testing.assert_close(resumed.checkpoint["state_dict"], whole.checkpoint["state_dict"], rtol=0, atol=1e-10)


def start(line: list[str]) -> list[subprocess.Popen[str]]:
    """Two ranks that nobody looks after."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "secura_lightning", *line],
            cwd=ROOT,
            env={**shared, "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("SIGKILL", 60), ("SIGSTOP", 120)])
def test_a_rank_that_is_gone_or_hangs_ends_the_other(name: str, limit: float, tmp_path: Path) -> None:
    ddp = {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"timeout": "0:00:30", "process_group_backend": "gloo"},
    }
    changes = {**QUICK, "trainer.devices": 2, "trainer.strategy": ddp, **signalled(name), "checkpoint.every_n_steps": 1}
    ranks = start(write(tmp_path, "lost", changes))
    try:
        folder = tmp_path / "runs" / "lost" / "version_0" / "checkpoints"
        deadline = time.monotonic() + 400  # starting takes long on a busy machine
        while not (folder / "last.ckpt").exists():  # step 1; rank 1 leaves in step 2
            assert time.monotonic() < deadline, "the run never started"
            assert ranks[0].poll() is None, ranks[0].communicate()[1][-2000:]
            time.sleep(0.2)
        error = ranks[0].communicate(timeout=limit)[1]
    finally:
        for process in ranks:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
    assert ranks[0].returncode == 1
    assert "secura fit: rank 0: another process of this run ended or hangs (" in error, error[-3000:]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 1
