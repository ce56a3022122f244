"""A-GEM: the step that is taken does not oppose the past's gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from secura_lightning.data.encode import collate
from secura_lightning.errors import ConfigError
from secura_lightning.strategies.agem import AGEM, project_
from tests.strategies.tiny import fit


def parameters_with(gradient: Tensor) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    parameters[0].grad, parameters[1].grad = gradient[:6].view(2, 3).clone(), gradient[6:].clone()
    return parameters


def flat(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])


def test_projection_is_that_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        gradient, reference = torch.randn(10, generator=generator), torch.randn(10, generator=generator)
        parameters = parameters_with(gradient)
        cosine = project_(parameters, [reference[:6].view(2, 3), reference[6:]])
        torch.testing.assert_close(cosine, torch.cosine_similarity(gradient, reference, dim=0))
        if cosine >= 0:
            assert torch.equal(flat(parameters), gradient)
        else:
            expected = gradient - (gradient @ reference) / (reference @ reference) * reference
            torch.testing.assert_close(flat(parameters), expected)
            assert abs(float(flat(parameters) @ reference)) < 1e-5


def test_projection_without_a_reference_changes_nothing() -> None:
    parameters = parameters_with(torch.ones(10))
    project_(parameters, [torch.zeros(2, 3), torch.zeros(4)])
    assert torch.equal(flat(parameters), torch.ones(10))


class Spied(AGEM):
    """Checks reference and projection against plain backward passes."""

    checked = projected = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = pl_module.adapters.trainable_parameters()
        for parameter in parameters:
            parameter.grad.neg_()  # uphill, which opposes the past wherever the tasks agree
        before = flat(parameters).clone()
        state = self._generator.get_state()
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        after = flat(parameters).clone()
        task, _ = trainer.datamodule.plan.locate_step(trainer.global_step)
        if task == 0:
            assert torch.equal(before, after)
            return
        rows = self.buffer.draw(self.reference_rows, task, torch.Generator().set_state(state))
        loss = pl_module.answer_loss(collate(rows, 2)) / sum(row.n_trained for row in rows)
        reference = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        along = before @ reference
        expected = before - min(0.0, float(along)) / (reference @ reference) * reference
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-10)
        type(self).checked += 1
        type(self).projected += along < 0


def test_step_is_projected_on_the_gradient_of_the_buffers_rows(tmp_path: Path) -> None:
    """With more reference rows than a micro-batch holds, and accumulation."""
    data = {"steps_per_task": [3, 3], "batch_size": 2}
    fit(tmp_path, [Spied(reference_rows=7)], data=data, model={"dtype": "float64"}, accumulate_grad_batches=2)
    assert Spied.checked == 3
    assert Spied.projected > 0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.callbacks\.AGEM\.reference_rows"):
        AGEM(0)
