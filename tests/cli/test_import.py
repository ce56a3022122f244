"""A PEFT folder made elsewhere becomes a start of ours; what has no counterpart is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from secura_lightning import from_pretrained
from secura_lightning.adapters import DoRAConfig, LoRAConfig, inject
from secura_lightning.cli.main import main
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.export.peft import export_peft, read_peft
from secura_lightning.export.saved import start_from
from secura_lightning.modeling.load import BaseSpec, load_model
from tests.cli.checkpoints import adapted, base_folder, logits_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


def exported(base: Path, folder: Path, config: Any) -> torch.Tensor:
    model, adapters = adapted(base, config)
    export_peft(adapters, folder, str(base))
    return logits_of(model)


@pytest.mark.parametrize(
    "config", [LoRAConfig(rank=4, rslora=True, bias=True), DoRAConfig(rank=4)], ids=("lora", "dora")
)
def test_imported_folder_loads_and_starts_a_run(base: Path, tmp_path: Path, config: Any) -> None:
    live = exported(base, tmp_path / "peft", config)
    out = tmp_path / "imported"
    assert main(["import", "--peft", str(tmp_path / "peft"), "--out", str(out)]) == 0
    torch.testing.assert_close(logits_of(from_pretrained(out)[0]), live, rtol=1e-4, atol=3e-4)
    start = yaml.safe_load((out / "start.yaml").read_text())["model"]
    assert start["start"] == str(out)
    model = load_model(BaseSpec(base=str(base))).eval()
    adapters = inject(model, type(config)(**start["adapter"]["init_args"]), seed=9)
    start_from(adapters, out)
    torch.testing.assert_close(logits_of(model), live, rtol=1e-4, atol=3e-4)


def test_ranks_and_scales_that_differ_are_kept(base: Path, tmp_path: Path) -> None:
    own = {"q_proj": {"rank": 2}, "layers.0.mlp.up_proj": {"rank": 8, "alpha": 3.0}}
    live = exported(base, tmp_path, LoRAConfig(rank=4, targets=["q_proj", "up_proj"], per_target=own))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(written["rank_pattern"].values()) | {written["r"]} == {2, 4, 8}
    config, tensors, named = read_peft(tmp_path)
    assert named == str(base)
    model = load_model(BaseSpec(base=str(base))).eval()
    inject(model, config).load_state_dict(tensors)
    torch.testing.assert_close(logits_of(model), live, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA; only LORA"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"bias": "all"}, "sets bias: all"),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights: pissa"),
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"lora_dropout": 1.5}, "dropout is 1.5"),
    ],
)
def test_what_has_no_counterpart_is_refused_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    exported(base, tmp_path / "peft", LoRAConfig(rank=4, targets=["q_proj"]))
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    capsys.readouterr()  # transformers' bar
    assert main(["import", "--peft", str(tmp_path / "peft"), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert message in told[0]
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_folders_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SecuraError, match=r"holds no adapter_config\.json"):
        read_peft(tmp_path)
    exported(base, tmp_path, LoRAConfig(rank=4, targets=["q_proj"]))
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(SecuraError, match="missing or damaged"):
        read_peft(tmp_path)
    save_file({"base_model.model.embed.lora_embedding_A": torch.zeros(2, 2)}, weights)
    with pytest.raises(SecuraError, match="no part of a LoRA on linear layers"):
        read_peft(tmp_path)
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(SecuraError, match="without its lora_B"):
        read_peft(tmp_path)


def test_start_of_other_settings_is_refused(base: Path, tmp_path: Path) -> None:
    exported(base, tmp_path / "peft", LoRAConfig(rank=4, targets=["q_proj"]))
    out = tmp_path / "imported"
    assert main(["import", "--peft", str(tmp_path / "peft"), "--out", str(out)]) == 0
    for config, error, message in (
        (DoRAConfig(rank=4, targets=["q_proj"]), ConfigError, "holds a LoRAConfig"),
        (LoRAConfig(rank=4, alpha=8, targets=["q_proj"]), ConfigError, r"model\.adapter\.alpha=16\.0"),
        (LoRAConfig(rank=4, targets=["v_proj"]), SecuraError, "missing"),
    ):
        with pytest.raises(error, match=message):
            start_from(inject(load_model(BaseSpec(base=str(base))), config), out)
    with pytest.raises(SecuraError, match=r"holds no adapter\.json"):
        start_from(inject(load_model(BaseSpec(base=str(base))), LoRAConfig(rank=4)), tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_from_an_imported_adapter(tmp_path: Path) -> None:
    from tests.integration.conftest import fit_into

    config = LoRAConfig(rank=2, targets=["q_proj", "down_proj"])
    model = load_model(BaseSpec()).eval()
    from tests.adapters.toy import move

    adapters = inject(model, config, seed=1)
    move(adapters, 0.05)
    export_peft(adapters, tmp_path / "peft", "pocket")
    assert main(["import", "--peft", str(tmp_path / "peft"), "--out", str(tmp_path / "imported")]) == 0
    start = ("--config", str(tmp_path / "imported" / "start.yaml"))
    with_start = fit_into(tmp_path, {"model.init": "pretrained", "data.steps_per_task": 1}, start, "started")
    plain = fit_into(tmp_path, {"model.init": "pretrained", "data.steps_per_task": 1}, folder="plain")
    assert with_start.report["meta"]["start"] == str(tmp_path / "imported")
    moved = with_start.checkpoint["state_dict"]
    for name, value in adapters.state_dict().items():
        assert (moved[name] - value).norm() < 0.5 * value.norm() + 0.2  # three steps from where it was
    first = "base_knowledge"
    assert with_start.report[first]["perplexity"][0] != plain.report[first]["perplexity"][0]
