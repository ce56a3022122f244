"""LwF: the task's start is remembered and compared with, on the tokens that the settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from secura_lightning.data.encode import Encoded, collate, collate_packed
from secura_lightning.data.tasks.pocket_corpus import PocketCorpus
from secura_lightning.errors import ConfigError
from secura_lightning.strategies.lwf import LwF, compared, distillation
from tests.strategies.tiny import fit, tensors
from tests.tiny import TinyTask

ROWS = [Encoded(list(range(5, 12)), 4), Encoded(list(range(5, 10)), 2)]


def test_compared_tokens_are_counted_alike_padded_and_packed() -> None:
    padded, packed = collate(ROWS, 2), collate_packed([ROWS], 2)
    for tokens, number in (("prompt", 3 + 1), ("answer", 3 + 3), ("all", 6 + 4)):
        for batch in (padded, packed):
            assert int(compared(batch, tokens).sum()) == number  # type: ignore[arg-type]
    assert compared(padded, "prompt").tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5]


def test_distillation_is_the_divergence_of_softened_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    old, now = (torch.randn(4, 9, generator=generator, dtype=torch.float64).float() for _ in range(2))
    p, q = F.softmax(old / 2, -1), F.softmax(now / 2, -1)
    torch.testing.assert_close(distillation(now, old, 2.0), 4 * (p * (p.log() - q.log())).sum())
    assert float(distillation(old, old, 2.0)) == pytest.approx(0, abs=1e-6)


class Spied(LwF):
    """Keeps the distillation terms."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.terms: list[float] = []

    def shape_loss(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, batch: dict[str, Any], batch_idx: int
    ) -> Tensor:
        shaped = super().shape_loss(trainer, pl_module, loss, batch, batch_idx)
        self.terms.append(float(shaped - loss))
        return shaped


def test_it_begins_with_the_second_task_at_zero_and_grows(tmp_path: Path) -> None:
    spy = Spied(tokens="all")
    fit(tmp_path, [spy], data={"steps_per_task": [3, 3]})
    assert spy.terms[:3] == [0.0] * 3
    assert spy.terms[3] == pytest.approx(0, abs=1e-5)
    assert spy.terms[4] > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["prompt", "answer", "all"])
def test_splitting_a_window_changes_nothing(tmp_path: Path, tokens: Any) -> None:
    def run(size: int, accumulate: int, packing: bool = False) -> dict[str, Tensor]:
        data = {"steps_per_task": [2, 3], "batch_size": size, "packing": packing}
        strategies = [LwF(alpha=5.0, tokens=tokens)]
        settings: dict[str, Any] = {"model": {"dtype": "float64"}, "accumulate_grad_batches": accumulate}
        return tensors(fit(tmp_path, strategies, data=data, **settings))

    whole = run(4, 1)
    for other in (run(2, 2), run(4, 1, packing=True)):
        for name, value in other.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-6)


def test_it_holds_the_second_task_back(tmp_path: Path) -> None:
    def moved(alpha: float) -> float:
        spy = LwF(alpha=alpha, tokens="all")
        fit(tmp_path, [spy], data={"steps_per_task": [3, 6]})
        assert spy.memory is not None
        return float(spy.memory.distance())

    assert moved(100.0) < moved(1e-6)


def test_prompts_of_text_are_refused(tmp_path: Path) -> None:
    tasks = [TinyTask("first"), PocketCorpus(n_documents=20)]
    with pytest.raises(ConfigError, match=r"trainer\.callbacks\.LwF\.tokens: .*set tokens: all"):
        fit(tmp_path, [LwF()], data={"tasks": tasks, "steps_per_task": [1, 1]})


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"temperature": -1.0}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.callbacks\.LwF\.{next(iter(settings))}"):
        LwF(**settings)
