"""Losses that are no numbers, memory that runs out, disks that are full, signals: each is said, and nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

from secura_lightning.callbacks import checkpoint, signals
from secura_lightning.callbacks.failures import FailureGuard, is_lost_rank, is_out_of_memory
from secura_lightning.callbacks.signals import Interrupted, StopRequest
from secura_lightning.callbacks.throughput import Throughput, token_operations
from secura_lightning.cli import fit
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.modeling.load import BaseSpec, load_model
from tests.integration.conftest import Fit
from tests.integration.test_resume import assert_same

SHORT = {"data.steps_per_task": [3, 1, 1], "forgetting.limit": 1, "data.probe": None}


def poisoned(**options: Any) -> dict[str, Any]:
    return {"trainer.callbacks": [{"class_path": "tests.distributed.callbacks.Poison", "init_args": options}]}


def signalled(name: str, step: int = 2) -> dict[str, Any]:
    options = {"step": step, "name": name}
    return {"trainer.callbacks": [{"class_path": "tests.distributed.callbacks.Signal", "init_args": options}]}


# ------------------------------------------------------------------- not finite


def test_a_loss_that_is_no_number_names_step_task_and_rows(run_fit: Callable[..., Fit]) -> None:
    with pytest.raises(SecuraError) as caught:
        run_fit({**SHORT, **poisoned(steps=[2])})
    text = str(caught.value)
    assert text.startswith("step 1, task 'first': the loss is not finite on rows train/")
    assert text.count("train/") == 4
    assert "failures.on_nonfinite: skip" in text
    assert "\n" not in text


@pytest.mark.slow
def test_a_gradient_that_overflows_is_told_from_a_loss(run_fit: Callable[..., Fit]) -> None:
    with pytest.raises(SecuraError, match="the loss is finite but its gradient is not"):
        run_fit({**SHORT, **poisoned(steps=[1], loss=False)})


def test_skipped_steps_change_nothing_and_are_counted(run_fit: Callable[..., Fit]) -> None:
    changes = {**SHORT, **poisoned(steps=[2, 3]), "failures.on_nonfinite": "skip", "data.steps_per_task": [3, 1, 1]}
    with pytest.warns(UserWarning, match=r"\[skipped: 2\]"):
        run = run_fit(changes)
    assert run.checkpoint["callbacks"]["FailureGuard"] == {"skipped": 2}
    assert all(value.isfinite().all() for value in run.checkpoint["state_dict"].values())
    first = torch.load(run.folder / "checkpoints" / "task1-first.ckpt", weights_only=True)
    steps = {float(state["step"]) for state in first["optimizer_states"][0]["state"].values()}
    assert steps == {1.0}  # of three


@pytest.mark.slow
def test_skipping_ends_after_so_many_steps(run_fit: Callable[..., Fit]) -> None:
    limits = {"failures.on_nonfinite": "skip", "failures.max_skipped": 1}
    with pytest.raises(SecuraError, match="the loss is not finite"):
        run_fit({**SHORT, **poisoned(steps=[1, 2]), **limits})


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"failures\.max_skipped"):
        FailureGuard(max_skipped=0)
    with pytest.raises(ConfigError, match=r"throughput\.window"):
        Throughput(window=0)


# ---------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error: Exception, told: bool) -> None:
    assert is_out_of_memory(error) is told


def test_out_of_memory_says_what_to_lower(run_fit: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(fit.ContinualModule, "training_step", full)
    with pytest.raises(SecuraError) as caught:
        run_fit(SHORT)
    text = str(caught.value)
    assert text.startswith("out of memory at step 0: set data.batch_size 2 with trainer.accumulate_grad_batches 2")
    for key in ("model.activation_checkpointing true", "model.dtype bfloat16", "data.max_length below 48"):
        assert key in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_a_lost_rank_is_recognised(error: Exception, told: bool) -> None:
    assert is_lost_rank(error) is told


# -------------------------------------------------------------------- full disk


def test_a_full_disk_leaves_the_last_good_checkpoint(
    run_fit: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the second save on the file cannot grow beyond a few bytes, as under a quota."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    saves: list[int] = []
    save = checkpoint.SequenceCheckpoint._save

    def limited(self: Any, trainer: Any, name: str) -> None:
        saves.append(trainer.global_step)
        if len(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            save(self, trainer, name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(checkpoint.SequenceCheckpoint, "_save", limited)
    try:
        with pytest.raises(
            SecuraError, match=r"^checkpoint: cannot write .*last\.ckpt \(File too large\); .* is whole"
        ):
            run_fit({**SHORT, "checkpoint.every_n_steps": 1})
    finally:
        signal.signal(signal.SIGXFSZ, ignored)
    folder = next(tmp_path.glob("runs/tiny/version_0/checkpoints"))
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 1
    monkeypatch.undo()
    resumed = run_fit(SHORT, ("--ckpt_path", "last"))
    assert resumed.checkpoint["global_step"] == 5


# ---------------------------------------------------------------------- signals


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param("SIGINT", marks=SLOW), "SIGTERM", pytest.param("SIGUSR1", marks=SLOW)])
def test_a_signal_saves_at_the_next_step_and_the_next_start_goes_on(run_fit: Callable[..., Fit], name: str) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    changes = {**SHORT, "checkpoint.every_n_steps": 100}
    with pytest.raises(Interrupted, match=rf"^saved at step 2 after {name}; continue with --ckpt_path last$") as caught:
        run_fit({**changes, **signalled(name)}, ("--ckpt_path", "auto"))
    assert caught.value.exit_code == 128 + signal.Signals[name]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    resumed = run_fit(changes, ("--ckpt_path", "auto"))
    if name == "SIGTERM":
        whole = run_fit(changes, folder="whole")
        assert resumed.report == whole.report
        for part in ("state_dict", "optimizer_states", "rng"):
            assert_same(resumed.checkpoint[part], whole.checkpoint[part], part)


def test_a_second_interrupt_stops_at_once() -> None:
    request = StopRequest()
    request.install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        request.restore()


def test_slurm_is_asked_to_requeue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    fake = tmp_path / "scontrol"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(cluster_environment=SLURMEnvironment()), is_global_zero=True, global_step=3
    )
    with pytest.raises(Interrupted):
        signals.stop(trainer, signal.SIGUSR1)
    assert asked.read_text() == "requeue 4711\n"
    with pytest.raises(Interrupted):  # the end of a time limit that asked for no requeue
        signals.stop(trainer, signal.SIGTERM)
    assert asked.read_text() == "requeue 4711\n"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert signals.requeue()
    assert asked.read_text().splitlines()[-1] == "requeue 12_3"
    fake.write_text("#!/bin/sh\necho no >&2; exit 1\n")
    with pytest.warns(UserWarning, match="no requeue of job 12_3: no"):
        assert not signals.requeue()


# ------------------------------------------------------------------- throughput


def test_tokens_per_second_and_utilisation_are_counted() -> None:
    monitor = Throughput(peak_tflops=0.5)
    monitor._peak = 0.5e12
    monitor._steps.extend([(2.0, 100, 4e11), (2.0, 300, 6e11)])
    assert monitor.rates(2) == {"tokens_per_second": 200.0, "mfu": 0.5}


def test_a_tokens_operations_follow_from_the_weights() -> None:
    model = load_model(BaseSpec())
    linear = 4 * (4 * 160 * 160 + 3 * 160 * 432) + 1280 * 160
    assert token_operations(model, 1000) == 4 * linear + 6000


@pytest.mark.slow
def test_throughput_is_logged(run_fit: Callable[..., Fit]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_fit({**SHORT, "throughput.peak_tflops": 0.1})
    events = EventAccumulator(str(run.folder)).Reload()
    rates = events.Scalars("throughput/tokens_per_second")
    assert rates
    assert rates[-1].value > 1
    assert 0 < events.Scalars("throughput/mfu")[-1].value < 10
