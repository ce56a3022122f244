"""Exported adapters compute the same elsewhere: in peft, and in our own loader; where they cannot, a line says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import secura_lightning
from secura_lightning import from_pretrained, load_adapters
from secura_lightning.adapters import DoRAConfig, FullConfig, LoRAConfig, PiSSAConfig, SECURAConfig, inject
from secura_lightning.cli.main import main
from secura_lightning.errors import SecuraError
from secura_lightning.export.lowrank import low_rank, truncate
from secura_lightning.export.peft import export_peft, read_peft
from secura_lightning.modeling.load import BaseSpec, load_model
from tests.adapters.toy import move
from tests.cli.checkpoints import EVERY, adapted, base_folder, checkpoint, logits_of
from tests.test_structure import imported_at_start

EXACT = {name: config for name, config in EVERY.items() if "element" not in name and name != "Full"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"), attention_bias=True, mlp_bias=True)


def in_peft(base: Path, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def again(base: Path, folder: Path) -> Any:
    """The folder read back by our own importer."""
    config, tensors, _ = read_peft(folder)
    model = load_model(BaseSpec(base=str(base))).eval()
    inject(model, config).load_state_dict(tensors)
    return model


@pytest.mark.parametrize("name", EXACT)
def test_exact_adapters_come_back_as_they_were(base: Path, tmp_path: Path, name: str) -> None:
    model, adapters = adapted(base, EXACT[name])
    found = export_peft(adapters, tmp_path, str(base))
    assert {part.error for part in found.values()} == {0.0}
    torch.testing.assert_close(logits_of(again(base, tmp_path)), logits_of(model), rtol=1e-4, atol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_exact_adapters_compute_the_same_in_peft(base: Path, tmp_path: Path, name: str) -> None:
    model, adapters = adapted(base, EXACT[name])
    export_peft(adapters, tmp_path, str(base))
    there = in_peft(base, tmp_path)
    live = logits_of(model)
    torch.testing.assert_close(logits_of(there), live, rtol=1e-4, atol=3e-4)
    there.save_pretrained(tmp_path / "by_peft")  # and what peft writes comes back
    torch.testing.assert_close(logits_of(again(base, tmp_path / "by_peft")), live, rtol=1e-4, atol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", [LoRAConfig(rank=4, rslora=True), DoRAConfig(rank=4, rslora=True),
    LoRAConfig(rank=4, per_target={"q_proj": {"rank": 2}, "layers.0.mlp.up_proj": {"rank": 8, "alpha": 3.0}}),
    PiSSAConfig(rank=4, alpha=2.0), SECURAConfig(c=8, a=12, norm="row", fusion="base")], ids=repr)  # fmt: skip
def test_scales_ranks_and_fusion_survive_in_peft(base: Path, tmp_path: Path, config: Any) -> None:
    model, adapters = adapted(base, config)
    adapters.end_task()  # fuses
    move(adapters, 0.02)
    export_peft(adapters, tmp_path, str(base))
    live = logits_of(model)
    torch.testing.assert_close(logits_of(in_peft(base, tmp_path)), live, rtol=1e-4, atol=3e-4)
    torch.testing.assert_close(logits_of(again(base, tmp_path)), live, rtol=1e-4, atol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [LoRAConfig(rank=4), DoRAConfig(rank=4), SECURAConfig(c=8, a=12, norm="row")], ids=repr
)
def test_gpt2s_transposed_layers_go_round(tmp_path: Path, config: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "base")
    model, adapters = adapted(tmp_path / "base", config)
    export_peft(adapters, tmp_path / "peft", None)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    live = logits_of(model)
    torch.testing.assert_close(logits_of(again(tmp_path / "base", tmp_path / "peft")), live, rtol=1e-4, atol=3e-4)
    torch.testing.assert_close(logits_of(in_peft(tmp_path / "base", tmp_path / "peft")), live, rtol=1e-4, atol=3e-4)
    adapters.merge_()
    torch.testing.assert_close(logits_of(model), live, rtol=1e-4, atol=3e-4)


def test_ranks_are_those_of_the_method(base: Path) -> None:
    for name, rank in {"LoRA-none": 4, "LoRANull-none": 4, "PiSSA-none": 8, "MiLoRA-none": 8, "CURLoRA-none": 4,
                       "SECURA-none": 8, "SECURA-row": 8, "LoRA-row": 4, "DoRA": 4}.items():  # fmt: skip
        _, adapters = adapted(base, EVERY[name])
        layer = adapters.layers["model.layers.0.mlp.up_proj"]
        assert low_rank("up_proj", layer, None, 0.1).rank == rank, name


@pytest.mark.parametrize("name", ["SECURA-element", "LoRA-element-detached-bias", "Full"])
def test_full_rank_changes_go_by_svd_to_a_tolerance(base: Path, tmp_path: Path, name: str) -> None:
    model, adapters = adapted(base, EVERY[name])
    live = logits_of(model)
    with adapters.disabled():
        change = (logits_of(model) - live).abs().max()
    errors, differences = [], []
    for tolerance in (0.3, 0.001):
        found = export_peft(adapters, tmp_path / str(tolerance), str(base), tolerance=tolerance)
        errors.append(max(part.error for part in found.values()))
        assert errors[-1] <= tolerance
        differences.append((logits_of(again(base, tmp_path / str(tolerance))) - live).abs().max())
    assert differences[1] < 0.05 * change
    assert differences[1] < differences[0]


def test_export_imports_neither_lightning_nor_peft() -> None:
    for path in (Path(secura_lightning.__file__).parent / "export").glob("*.py"):
        for name in imported_at_start(path):
            assert not name.startswith(("lightning", "peft")), path
            parts = ("cli", "module", "callbacks", "strategies")
            assert not name.startswith(tuple(f"secura_lightning.{part}" for part in parts)), path


@pytest.mark.slow
def test_python_use_leaves_lightning_alone() -> None:
    code = (
        "import sys; from secura_lightning import from_pretrained, inject, load_adapters, merge, save_adapters; "
        "assert not {'lightning', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_truncation_is_the_best_there_is() -> None:
    torch.manual_seed(0)
    change = torch.randn(20, 12) @ torch.randn(12, 30)
    u, s, vt = torch.linalg.svd(change)
    for matrix in (change, change.t()):
        left, right, error = truncate(matrix, 5, 0.0)
        best = (u[:, :5] * s[:5]) @ vt[:5]
        torch.testing.assert_close(left @ right, best if matrix is change else best.t(), rtol=1e-4, atol=1e-4)
        assert error == pytest.approx(float((change - best).norm() / change.norm()), rel=1e-5)
    left, right, error = truncate(change, None, 1e-4)
    assert right.shape[0] == 12
    assert error <= 1e-4
    assert truncate(torch.zeros(4, 6), None, 0.1)[2] == 0


def test_command_writes_a_peft_folder(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = checkpoint(tmp_path / "last.ckpt", base, EVERY["PiSSA-none"])
    assert main(["export", "--ckpt", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "peft")]) == 0
    told = capsys.readouterr().out
    assert "14 modules exactly, at rank 8." in told
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"README.md", "adapter_config.json",
                                                                    "adapter_model.safetensors"}  # fmt: skip
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert (tmp_path / "peft" / "README.md").read_text().startswith("---\nlibrary_name: peft\n")
    torch.testing.assert_close(logits_of(again(base, tmp_path / "peft")), live, rtol=1e-4, atol=3e-4)


def test_svd_says_its_error(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "last.ckpt", base, EVERY["SECURA-element"])
    arguments = ["export", "--ckpt", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "peft")]
    assert main([*arguments, "--rank", "1"]) == 1
    assert "rank 1 holds its change to a relative error of" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()
    assert main(arguments) == 0
    assert "by truncated SVD, at rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "LoRANull-row-detached-bias",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("SECURA-element", "Full")),
    ],
)
def test_own_format_is_exact_and_loads_without_lightning(base: Path, tmp_path: Path, name: str) -> None:
    live = checkpoint(tmp_path / "last.ckpt", base, EVERY[name])
    out = tmp_path / "own"
    arguments = ["--ckpt", str(tmp_path / "last.ckpt"), "--out", str(out), "--format", "safetensors"]
    assert main(["export", *arguments]) == 0
    model, tokenizer, adapters = from_pretrained(out)
    torch.testing.assert_close(logits_of(model), live, rtol=1e-6, atol=1e-6)
    assert tokenizer("a")["input_ids"]
    assert all(layer.calibrated for layer in adapters.layers.values()) or "Null" in name
    torch.testing.assert_close(
        logits_of(load_adapters(load_model(BaseSpec(base=str(base))).eval(), out).model), live, rtol=1e-6, atol=1e-6
    )
    assert main(["merge", "--ckpt", str(out), "--out", str(tmp_path / "merged")]) == 0  # it serves as a checkpoint


def test_own_format_is_refused_on_other_weights(base: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-none"])
    own = tmp_path / "own"
    assert main(["export", "--ckpt", str(tmp_path / "last.ckpt"), "--out", str(own), "--format", "safetensors"]) == 0
    other = load_model(BaseSpec(base=str(base_folder(tmp_path / "other", seed=3))))
    with pytest.raises(SecuraError, match="other base weights"):
        load_adapters(other, own)
    (own / "adapter.safetensors").write_bytes(b"rubbish")
    with pytest.raises(SecuraError, match="missing or damaged"):
        from_pretrained(own)


def test_what_peft_cannot_hold_is_refused(base: Path, tmp_path: Path) -> None:
    for config, message in (
        (DoRAConfig(rank=4, bias=True), "PEFT's DoRA has no bias"),
        (FullConfig(targets="everything"), "is no linear layer"),
        (SECURAConfig(c=8, a=12, norm="official"), "no weight computes the same"),
    ):
        with pytest.raises(SecuraError, match=message):
            export_peft(adapted(base, config)[1], tmp_path / "peft", None)
    assert not (tmp_path / "peft").exists()


def test_push_uploads_the_written_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
            calls.append(("create", (repo, private, exist_ok)))

        def upload_folder(self, folder_path: Path, repo_id: str, commit_message: str) -> Any:
            calls.append(("upload", (sorted(path.name for path in folder_path.iterdir()), repo_id)))
            return SimpleNamespace(commit_url="https://hub/me/mine/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-none"])
    arguments = ["--ckpt", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "peft"), "--push", "me/mine"]
    assert main(["export", *arguments]) == 0
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert calls == [("create", ("me/mine", True, True)), ("upload", (files, "me/mine"))]
    assert "uploaded to https://hub/me/mine/commit/1" in capsys.readouterr().out
    monkeypatch.setattr(Hub, "create_repo", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    assert main(["export", *arguments[:3], str(tmp_path / "peft2"), *arguments[4:]]) == 1
    assert "--push me/mine: no network" in capsys.readouterr().err
    assert (tmp_path / "peft2" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tolerance", "1.5"], 2, "--tolerance is 1.5"),
        (["--rank", "0"], 2, "--rank is 0"),
        (["--format", "gguf"], 2, "invalid choice: 'gguf'"),
        (["--frmat", "peft"], 2, "unrecognized arguments: --frmat"),
        (["--text", "absent.txt"], 1, "cannot read absent.txt"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["export", "--ckpt", "absent.ckpt", "--out", str(tmp_path / "o"), *arguments]) == code
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].startswith("secura export: ")
    assert message in told[0]
