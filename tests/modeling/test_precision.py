"""The autocast of a command without a trainer is the one that Lightning's trainer has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from secura_lightning.modeling.precision import autocast, autocast_type, full_name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16", "bf16-true", "32-true", "32", 32, "64-true", 64, None])
def test_a_product_has_the_type_that_it_has_in_fit(precision: Any) -> None:
    trainer = Trainer(precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert full_name(precision) == trainer.precision
    left = torch.ones(2, 2, dtype=torch.float32)
    with trainer.precision_plugin.forward_context():
        # a true precision sets the default type, which no product of existing tensors follows
        expected = (left @ left).dtype
    with autocast(precision, "cpu"):
        assert (left @ left).dtype == expected


@pytest.mark.parametrize("precision", ["16-mixed", "16", 16])
def test_half_precision_is_known_by_each_of_its_names(precision: Any) -> None:
    assert full_name(precision) == "16-mixed"  # Lightning builds it only where there is a GPU
    assert autocast_type(precision) is torch.float16
