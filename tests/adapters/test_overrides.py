"""Sizes of single modules: the same mechanism for every adapter that has sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secura_lightning.adapters import (
    AdapterConfig,
    CURLoRAConfig,
    DoRAConfig,
    FullConfig,
    LoRAConfig,
    LoRANullConfig,
    MiLoRAConfig,
    PiSSAConfig,
    SECURAConfig,
    describe_adapter,
    inject,
    rebuild_adapter,
)
from secura_lightning.errors import ConfigError, SecuraError
from tests.adapters.toy import IDS, ToyModel, move

RANKED = [LoRAConfig, DoRAConfig, PiSSAConfig, MiLoRAConfig, LoRANullConfig, CURLoRAConfig]


def sizes(config: AdapterConfig, tensor: str) -> dict[str, tuple[int, ...]]:
    """Shape of one tensor at every module of the first block."""
    state = inject(ToyModel(), config).state_dict()
    start = "layers.0."
    return {
        key[len(start) :].removesuffix(f".{tensor}"): tuple(value.shape)
        for key, value in state.items()
        if key.startswith(start) and key.endswith(f".{tensor}")
    }


@pytest.mark.parametrize("cls", RANKED)
def test_rank_differs_where_it_is_set_and_nowhere_else(cls: Any) -> None:
    tensor = "U" if cls is CURLoRAConfig else "lora_A"
    found = sizes(cls(rank=4, per_target={"o_proj": {"rank": 3}, "layers.1.fc": {"rank": 2}}), tensor)
    assert {name: shape[0] for name, shape in found.items()} == {
        "q_proj": 4, "o_proj": 3, "fc": 4, "twin_a": 4, "twin_b": 4,
    }  # fmt: skip


def test_secura_differs_in_c_and_a() -> None:
    found = sizes(SECURAConfig(c=8, a=12, per_target={"q_proj": {"c": 5, "a": 7}, "fc": {"a": 9}}), "A")
    assert (found["q_proj"], found["fc"], found["o_proj"]) == ((5, 7), (8, 9), (8, 12))


def test_longer_name_wins_setting_by_setting() -> None:
    config = LoRAConfig(per_target={"layers.0.q_proj": {"rank": 2}, "q_proj": {"rank": 4, "alpha": 6}})
    layers = inject(ToyModel(), config).layers
    assert [layers[f"layers.{i}.q_proj"].lora_A.shape[0] for i in (0, 1)] == [2, 4]
    assert [layers[f"layers.{i}.q_proj"].scale for i in (0, 1)] == [6 / 2, 6 / 4]
    assert layers["layers.0.o_proj"].scale == 16 / 8


def test_other_modules_start_as_without_it_and_merging_is_exact() -> None:
    plain = inject(ToyModel(), LoRAConfig(), seed=3).state_dict()
    config = LoRAConfig(per_target={"fc": {"rank": 3}})
    for key, value in inject(ToyModel(), config, seed=3).state_dict().items():
        assert (value.shape != plain[key].shape) if ".fc." in key else torch.equal(value, plain[key])
    model = ToyModel().double()
    adapters = inject(model, config)
    move(adapters)
    expected = model(IDS)
    adapters.merge_()
    torch.testing.assert_close(model(IDS), expected)


def test_it_belongs_to_the_checkpoint() -> None:
    config = LoRAConfig(per_target={"fc": {"rank": 3}})
    assert rebuild_adapter(describe_adapter(config)) == config
    with pytest.raises(SecuraError, match=r"layers\.0\.fc\.lora_A has shape"):
        inject(ToyModel(), LoRAConfig()).load_state_dict(inject(ToyModel(), config).state_dict())


@pytest.mark.parametrize(
    ("per_target", "message"),
    [
        ({"o_prj": {"rank": 2}}, r"per_target names 'o_prj', which none of the targets has: did you mean o_proj"),
        ({"zzz": {"rank": 2}}, r"per_target names 'zzz', which none of the targets has: there are q_proj, o_proj, fc"),
        (
            {"fc": {"rank": 65}},
            r"model\.adapter\.per_target\.fc\.rank is 65, but layers\.0\.fc is 64 x 64: use at most",
        ),
        ({"fc": {"rank": 0}}, r"model\.adapter\.per_target\.fc\.rank is 0: it must be at least 1"),
        ({"fc": {"rank": 2.5}}, r"model\.adapter\.per_target\.fc\.rank is 2\.5: it must be a whole number"),
        ({"fc": {"alpha": -1}}, r"model\.adapter\.per_target\.fc\.alpha is -1: it must be above 0"),
        ({"fc": {"dropout": 0.1}}, r"per_target\.fc sets 'dropout', but LoRAConfig can differ in rank, alpha alone"),
        ({"fc": {}}, r"model\.adapter\.per_target\.fc is empty"),
    ],
)
def test_bad_entries_name_the_key_and_the_fix(per_target: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inject(ToyModel(), LoRAConfig(per_target=per_target))


def test_excluded_modules_are_no_targets() -> None:
    with pytest.raises(ConfigError, match=r"per_target names 'fc'"):
        inject(ToyModel(), LoRAConfig(exclude="fc", per_target={"fc": {"rank": 2}}))


def test_full_fine_tuning_has_no_sizes() -> None:
    with pytest.raises(TypeError, match="per_target"):
        FullConfig(per_target={"fc": {"rank": 2}})  # type: ignore[call-arg]
