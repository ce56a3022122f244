"""DER++: a row is replayed with the logits that the model gave when it learned it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from secura_lightning.data.encode import collate
from secura_lightning.errors import ConfigError
from secura_lightning.strategies.buffer import ReplayBuffer
from secura_lightning.strategies.derpp import DERPP
from secura_lightning.strategies.er import ER
from secura_lightning.strategies.memory import answering
from secura_lightning.strategies.replay import Replayed
from tests.strategies.tiny import fit, lora, tensors


def buffer_of(trainer: Trainer) -> ReplayBuffer:
    return next(callback for callback in trainer.callbacks if isinstance(callback, ReplayBuffer))


class Fresh(Callback):
    """After the first step, compares what the buffer holds with what the model says."""

    compared = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step != 1:
            return
        for sample in buffer_of(trainer).draw(4, 1, torch.Generator()):
            with answering(pl_module.model):
                logits = pl_module.logits(collate([sample], 2))[0]
            first = max(1, sample.n_prompt)
            expected = logits[first - 1 : len(sample.ids) - 1].topk(5, dim=-1)
            torch.testing.assert_close(sample.logits, expected.values, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                logits[first - 1 : -1].gather(1, sample.tokens), sample.logits, rtol=1e-4, atol=1e-5
            )
            assert sample.logits.shape == (sample.n_trained, 5)
            self.compared += 1


@pytest.mark.parametrize("on_disk", [False, True])
def test_kept_logits_are_those_of_the_step_that_learned_the_row(tmp_path: Path, on_disk: bool) -> None:
    check = Fresh()
    trainer = fit(
        tmp_path,
        [ReplayBuffer(on_disk=on_disk), DERPP(top_k=5), check],
        adapter=lora(dropout=0.3),
        data={"steps_per_task": [2]},
    )
    assert check.compared == 4
    state = buffer_of(trainer).state_dict()["ranks"][0]
    assert set(state["table"][:, 5].tolist()) == {5}


class Spied(DERPP):
    """Keeps the difference of logits of every micro-batch, and asks for it again at the rows' own moment."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.parts: list[tuple[float, float]] = []

    def replay_loss(self, trainer: Trainer, pl_module: LightningModule, replayed: Replayed, weight: float) -> Any:
        loss = super().replay_loss(trainer, pl_module, replayed, weight)
        plain = super().replay_loss(trainer, pl_module, replayed, 0.0) / self.alpha
        answers = self._answers(trainer, pl_module, replayed.rows)
        moved = [
            (now[0].gather(1, now[1].argsort(1)) - row.logits.gather(1, row.tokens.argsort(1))).square().sum()
            for now, row in zip(answers, replayed.rows, strict=True)
            if torch.equal(now[1].sort(1).values, row.tokens.sort(1).values)
        ]
        if len(moved) == len(replayed.rows):
            expected = sum(moved) / (self.top_k * replayed.trained)
            torch.testing.assert_close(plain.detach(), expected, rtol=1e-3, atol=1e-6)
            self.parts.append((float(plain.detach()), float(expected)))
        return loss


def test_difference_is_the_mean_square_over_answer_tokens(tmp_path: Path) -> None:
    spy = Spied(top_k=259, alpha=0.5)  # the whole vocabulary, so that the same tokens are kept at any time
    fit(tmp_path, [spy], data={"steps_per_task": [3, 2]})
    assert len(spy.parts) == 2
    assert all(plain > 0 for plain, _ in spy.parts)


def test_it_differs_from_er_and_trains(tmp_path: Path) -> None:
    found = [tensors(fit(tmp_path, [s], data={"steps_per_task": [3, 3]})) for s in (ER(), DERPP(alpha=1.0))]
    assert any(not torch.equal(value, found[0][name]) for name, value in found[1].items())
    assert all(torch.isfinite(value).all() for value in found[1].values())


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"top_k": 0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.callbacks\.DERPP\.{next(iter(settings))}"):
        DERPP(**settings)
