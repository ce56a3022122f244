"""Lightning builds models inside a device context, in which tensors without a device of their own land elsewhere."""

from __future__ import annotations

import pytest
import torch

from secura_lightning.adapters import AdapterConfig, inject
from tests.adapters.toy import VARIANTS, ToyModel, adapted


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_adapters_follow_their_base_and_not_the_context(config: AdapterConfig) -> None:
    model = ToyModel()
    with torch.device("meta"):
        adapters = inject(model, config, seed=1)
    _, expected = adapted(config, moved=False)
    for key, value in expected.state_dict().items():
        assert torch.equal(adapters.state_dict()[key], value), key
