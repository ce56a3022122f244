"""Injection: what matches, what is refused and with which words, sharing, the report, merging."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secura_lightning.adapters import FullConfig, LoRAConfig, SECURAConfig, describe_adapter, inject, rebuild_adapter
from secura_lightning.errors import ConfigError, SecuraError
from tests.adapters.toy import IDS, VARIANTS, ToyModel, adapted, move, with_settings


def names(targets: str | list[str], exclude: str | None = None) -> list[str]:
    return list(inject(ToyModel(), LoRAConfig(targets=targets, exclude=exclude)).layers)


def test_targets_match_whole_names_and_dotted_suffixes() -> None:
    assert names("q_proj") == ["layers.0.q_proj", "layers.1.q_proj"]
    assert names(["1.q_proj", "o_proj"]) == ["layers.0.o_proj", "layers.1.q_proj", "layers.1.o_proj"]
    assert names("layers.0.fc") == ["layers.0.fc"]
    assert names("lm_head") == ["lm_head"]


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    assert len(names("all-linear")) == 10
    assert "lm_head" not in names("all-linear")


def test_all_linear_knows_the_head_by_what_the_model_says() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.vocabulary = nn.Linear(16, 16), nn.Linear(16, 20)

        def get_output_embeddings(self) -> nn.Module:
            return self.vocabulary

    assert list(inject(Model(), LoRAConfig()).layers) == ["inner"]


def test_exclude_is_searched_in_the_whole_name() -> None:
    assert names("all-linear", r"layers\.0|twin") == ["layers.1.q_proj", "layers.1.o_proj", "layers.1.fc"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(targets="q_prj"), r"names 'q_prj', which matches no module: did you mean .*q_proj"),
        (
            LoRAConfig(targets=["q_proj", "nonsense"]),
            r"'nonsense', which matches no module: the model has q_proj, o_proj",
        ),
        (LoRAConfig(targets="all-liner"), r"did you mean all-linear"),
        (LoRAConfig(targets="everything"), r"names 'everything', which matches no module"),
        (LoRAConfig(targets="embed"), r"names 'embed', a Embedding, which LoRAConfig cannot adapt"),
        (LoRAConfig(exclude="."), r"with exclude '\.' leaves no module"),
        (SECURAConfig(c=60), r"model\.adapter\.c is 60, but layers\.0\.q_proj is 56 x 64: use at most 56"),
    ],
)
def test_refusals_name_the_key_and_the_fix_and_leave_the_model_alone(config: LoRAConfig, message: str) -> None:
    model = ToyModel()
    with pytest.raises(ConfigError, match=message):
        inject(model, config)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.layers[0].q_proj) is nn.Linear


def test_second_injection_is_refused() -> None:
    model, _ = adapted(LoRAConfig())
    with pytest.raises(SecuraError, match="already has adapters"):
        inject(model, LoRAConfig())


def test_one_module_under_two_names_gets_one_adapter_in_both_places() -> None:
    model = nn.ModuleDict({"a": nn.Linear(16, 16)})
    model["b"] = model["a"]
    adapters = inject(model, LoRAConfig(targets="b"))
    assert list(adapters.layers) == ["b"]
    assert model["a"] is model["b"] is adapters.layers["b"]
    plain = adapters.layers["b"].base
    adapters.merge_()
    assert model["a"] is model["b"] is plain


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_modules_that_share_a_weight(config: LoRAConfig) -> None:
    model, adapters = adapted(config, torch.float64)
    twins = [adapters.layers["layers.0.twin_a"], adapters.layers["layers.0.twin_b"]]
    assert twins[0].base.weight is twins[1].base.weight
    expected = model(IDS)
    untied = adapters.merge_()
    torch.testing.assert_close(model(IDS), expected, rtol=1e-10, atol=1e-10)
    block = model.layers[0]
    if isinstance(config, FullConfig):  # one weight, trained as one
        assert twins[0].tuned_weight is twins[1].tuned_weight
        assert untied == []
        assert block.twin_a.weight is block.twin_b.weight
    else:  # each its own change
        assert untied == ["layers.0.twin_a", "layers.0.twin_b", "layers.1.twin_a", "layers.1.twin_b"]
        assert not torch.equal(block.twin_a.weight, block.twin_b.weight)
    assert model.lm_head.weight is model.embed.weight


def test_merging_an_adapted_head_unties_it_from_the_embedding_and_says_so() -> None:
    model = ToyModel()
    adapters = inject(model, LoRAConfig(targets="lm_head"))
    move(adapters)
    before, expected = model.embed.weight.clone(), model(IDS)
    assert adapters.merge_() == ["lm_head"]
    assert torch.equal(model.embed.weight, before)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)


def test_merging_into_a_quantised_base_is_refused_before_anything_is_written() -> None:
    class Linear4bit(nn.Linear):
        """Known by its name, as bitsandbytes' is."""

    model = nn.Sequential(nn.Linear(8, 8), Linear4bit(8, 8))
    adapters = inject(model, LoRAConfig(rank=2))
    move(adapters)
    before = adapters.layers["0"].base.weight.clone()
    with pytest.raises(SecuraError, match=r"1 is quantised.*model\.quantization: none"):
        adapters.merge_()
    assert torch.equal(adapters.layers["0"].base.weight, before)


def test_report_counts_what_matched() -> None:
    report = inject(ToyModel(), LoRAConfig(targets=["q_proj", "fc"], rank=4)).report()
    lines = report.splitlines()
    assert lines[1].split() == ["q_proj", "2", "56", "x", "64", "960"]
    assert lines[2].split() == ["fc", "2", "64", "x", "64", "1,024"]
    total = sum(p.numel() for p in ToyModel().parameters()) + 1984
    share = f"1,984 of {total:,} parameters ({1984 / total:.2%})"
    assert lines[3] == f"LoRA (targets ['q_proj', 'fc'], rank 4) on 4 modules trains {share}"


def test_end_of_task_reaches_every_layer_and_averages_the_logs() -> None:
    _, adapters = adapted(SECURAConfig(targets=["q_proj", "o_proj"]))
    ratios = []
    for layer in adapters.layers.values():
        ratios.append((layer.delta_row_square().sqrt() / layer.reference_norm).mean())
    fusion = adapters.end_task()
    assert [id(p) for p in fusion.reset] == [id(layer.B) for layer in adapters.layers.values()]
    torch.testing.assert_close(fusion.logs["row_ratio"], torch.stack(ratios).mean().detach())
    assert adapters.after_step(1).reset == []


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_description_rebuilds_the_settings(config: LoRAConfig) -> None:
    changed = with_settings(config, targets=["q_proj"], exclude="x")
    assert rebuild_adapter(describe_adapter(changed)) == changed


def test_description_of_another_version_is_refused() -> None:
    with pytest.raises(SecuraError, match="adapter NoSuchConfig is unknown"):
        rebuild_adapter({"class": "NoSuchConfig"})
    with pytest.raises(SecuraError, match="LoRAConfig has other settings"):
        rebuild_adapter({"class": "LoRAConfig", "colour": 3})
