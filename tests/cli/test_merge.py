"""A merged folder is a plain model that computes what the live one did; a bad command line is one line."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_lightning import merge
from secura_lightning.adapters import AdapterConfig, DoRAConfig, LoRAConfig, SECURAConfig, inject
from secura_lightning.cli.main import main
from secura_lightning.cli.merge import _allowed
from tests.adapters.toy import move
from tests.cli.checkpoints import EVERY, IDS, base_folder, checkpoint, logits_of

QUICK = ("SECURA-element", "DoRA")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


def merged_of(tmp_path: Path, *arguments: str) -> Any:
    out = tmp_path / "merged"
    assert main(["merge", "--ckpt", str(tmp_path / "last.ckpt"), "--out", str(out), *arguments]) == 0
    return AutoModelForCausalLM.from_pretrained(out).eval()


def check_round_trip(base: Path, tmp_path: Path, config: AdapterConfig) -> None:
    if getattr(config, "bias", False):  # merging needs a place for them
        base = base_folder(tmp_path / "base", attention_bias=True, mlp_bias=True)
    live = checkpoint(tmp_path / "last.ckpt", base, config)
    torch.testing.assert_close(logits_of(merged_of(tmp_path)), live, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", QUICK)
def test_merged_folder_computes_what_the_live_model_did(base: Path, tmp_path: Path, name: str) -> None:
    check_round_trip(base, tmp_path, EVERY[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EVERY if name not in QUICK])
def test_merged_folder_of_every_adapter(base: Path, tmp_path: Path, name: str) -> None:
    check_round_trip(base, tmp_path, EVERY[name])


def test_folder_is_whole(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-none"])
    merged_of(tmp_path, "--max-shard-size", "40KB")
    out = tmp_path / "merged"
    names = {path.name for path in out.iterdir()}
    shards = {name for name in names if name.startswith("model-")}
    assert len(shards) > 1
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert names - shards == kept | {"model.safetensors.index.json"}
    assert set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values()) == shards
    assert (
        AutoTokenizer.from_pretrained(out)("abc")["input_ids"]
        == AutoTokenizer.from_pretrained(base)("abc")["input_ids"]
    )
    assert json.loads((out / "config.json").read_text())["use_cache"] is True
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| rank | 4 |" in card
    assert "Largest logit difference" in card
    assert "largest logit difference from the live model" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*.part"))


def test_a_tied_head_that_alone_was_trained_comes_apart(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", tie_word_embeddings=True)
    live = checkpoint(tmp_path / "last.ckpt", base, LoRAConfig(targets=["lm_head"], rank=4))
    merged = merged_of(tmp_path)
    torch.testing.assert_close(logits_of(merged), live, rtol=1e-4, atol=2e-4)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_bf16_weights_are_the_fp32_sum_rounded_once(base: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "last.ckpt", base, LoRAConfig(targets=["q_proj"], rank=4), dtype="bfloat16")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    merged_of(tmp_path)
    name = "model.layers.1.self_attn.q_proj"
    before = load_file(base / "model.safetensors")[f"{name}.weight"].bfloat16().float()
    change = 4.0 * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]  # alpha 16 / rank 4
    after = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    assert after.dtype == torch.bfloat16
    assert (after != (before + change).bfloat16()).float().mean() < 1e-3  # sums of another order may round elsewhere
    assert not torch.equal(after.float(), before)


def test_a_difference_above_the_tolerance_keeps_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-none"], dtype="bfloat16")
    arguments = ["--ckpt", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "merged")]
    assert main(["merge", *arguments, "--tolerance", "0"]) == 1
    assert "above 0 (--tolerance)" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt"}


def test_a_change_that_rounding_loses_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {effect: _allowed(None, torch.bfloat16, effect, None) for effect in (0.0, 0.04, 1.0, 40.0)}
    assert {effect: limit for effect, (limit, _) in limits.items()} == {0.0: 0.0, 0.04: 0.02, 1.0: 0.5, 40.0: 1.0}
    assert limits[0.04][1] == "half of what the change does, in bfloat16 weights"
    assert _allowed(None, torch.float32, 1e-6, None)[0] == 1e-4
    assert _allowed(None, torch.bfloat16, 0.04, 0.3)[0] == 1.6
    assert _allowed(0.7, torch.bfloat16, 0.04, None) == (0.7, "--tolerance")
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-none"], dtype="bfloat16")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = {name: 0.003 * value if name.endswith("lora_B") else value for name, value in content["state_dict"].items()}
    torch.save({**content, "state_dict": state}, tmp_path / "last.ckpt")
    arguments = ["--ckpt", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "merged")]
    assert main(["merge", *arguments]) == 1
    assert "half of what the change does" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert main(["merge", *arguments, "--tolerance", "2"]) == 0
    told = capsys.readouterr().out
    assert "(limit 2: --tolerance)" in told
    assert "largest logit difference that the change itself makes: " in told


@pytest.mark.slow
@pytest.mark.parametrize("onto", ["base", "dequantized"])
@pytest.mark.parametrize(
    "config", [EVERY["LoRA-none"], EVERY["SECURA-element"], EVERY["DoRA"]], ids=("lora", "secura", "dora")
)
def test_4_bit_run_merges_onto_either_base(
    tmp_path: Path, config: AdapterConfig, onto: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    base = base_folder(tmp_path / "base", hidden_size=64, intermediate_size=128)
    quantised = {"quantization": "nf4", "compute_dtype": "float32", "double_quant": False}
    live = checkpoint(tmp_path / "last.ckpt", base, config, **quantised)
    merged = merged_of(tmp_path, "--onto", onto)
    told = capsys.readouterr().out
    assert ("original base" if onto == "base" else "dequantised base") in told
    assert ("original base" if onto == "base" else "dequantised base") in (
        tmp_path / "merged" / "README.md"
    ).read_text()
    assert not any("quant" in key for key in json.loads((tmp_path / "merged" / "config.json").read_text()))
    difference = (logits_of(merged) - live).abs().max()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    if onto == "dequantized":
        assert difference < 2e-3
        assert (logits_of(merged) - logits_of(plain)).abs().max() > 10 * difference
        return
    change = _changes(base, config, quantised)
    for name, module in plain.named_modules():
        if name in change:
            torch.testing.assert_close(merged.get_submodule(name).weight, module.weight + change[name])


def _changes(base: Path, config: AdapterConfig, quantised: dict[str, Any]) -> dict[str, torch.Tensor]:
    from tests.cli.checkpoints import adapted

    return {name: layer.delta_weight() for name, layer in adapted(base, config, **quantised)[1].layers.items()}


class Allocations(TorchDispatchMode):
    """Bytes of tensors that live, relative to the start, and their peak.

    Args:
        there: Tensors that are there already: they count once they go.
    """

    def __init__(self, there: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()
        for tensor in there:
            self._watch(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and self._watch(tensor.untyped_storage()):
                self.now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def _watch(self, storage: Any) -> bool:
        """Whether the storage is new."""
        key = storage._cdata
        if key in self.seen:
            return False
        self.seen.add(key)
        weakref.finalize(storage, self._free, key, storage.nbytes())
        return True

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


LAYERS, OUT, IN = 3, 2048, 2048


@pytest.mark.parametrize(
    "config",
    [LoRAConfig(rank=8), LoRAConfig(rank=8, norm="element"), SECURAConfig(c=16, a=24), DoRAConfig(rank=8)],
    ids=("lora", "lora-element", "secura-element", "dora"),
)
def test_merging_takes_one_layer_of_extra_memory(config: AdapterConfig) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(IN, OUT, bias=False).bfloat16() for _ in range(LAYERS)))
    adapters = inject(model, config)
    move(adapters, 0.01)
    layer = OUT * IN * 2  # bytes of one bf16 weight
    there = [*model.parameters(), *model.buffers()]
    allocations = Allocations(there)
    del there
    with allocations:
        merge(adapters)
    # The new weight of the layer in hand, while the old one is still there, and working blocks smaller than another.
    assert layer < allocations.peak < 2 * layer, f"{allocations.peak / layer:.2f} layers"


def test_python_merge_gives_the_plain_model_back() -> None:
    from tests.evaluation.tiny import tiny_llama

    model = tiny_llama()
    kinds = [type(module) for module in model.modules()]
    adapters = inject(model, EVERY["SECURA-row"])
    move(adapters, 0.05)
    live = logits_of(model)
    merged = merge(adapters)
    assert merged is model
    assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(logits_of(model), live, rtol=1e-4, atol=2e-4)
    assert IDS.shape == live.shape[:2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ckpt", "absent.ckpt", "--out", "{tmp}/o"], 1, "--ckpt: no file absent.ckpt"),
        (["--out", "{tmp}/o"], 2, "required: --ckpt"),
        (["--ckpt", "{tmp}/last.ckpt"], 2, "required: --out"),
        (["--ckpt", "{tmp}/last.ckpt", "--out", "{tmp}"], 1, "is not empty"),
        (["--ckpt", "{tmp}/last.ckpt", "--out", "{tmp}/last.ckpt"], 1, "is a file"),
        (["--ckpt", "{tmp}", "--out", "{tmp}/o"], 1, "adapter.json"),
        (["--ckpt", "{tmp}/last.ckpt", "--out", "{tmp}/o", "--onto", "base"], 2, "the run's base is not quantised"),
        (["--ckpt", "{tmp}/last.ckpt", "--out", "{tmp}/o", "--onto", "moon"], 2, "invalid choice: 'moon'"),
        (["--ckpt", "{tmp}/last.ckpt", "--out", "{tmp}/o", "--tolerance", "-1"], 2, "--tolerance is -1.0"),
        (["--ckpt", "{tmp}/last.ckpt", "--out", "{tmp}/o", "--max-shard-size", "big"], 2, "--max-shard-size is big"),
        (
            ["--ckpt", "{tmp}/last.ckpt", "--out", "{tmp}/o", "--text", "absent.txt"],
            1,
            "--text: cannot read absent.txt",
        ),
        (["--ckpt", "{tmp}/last.ckpt", "--out", "{tmp}/o", "--push", "nowhere"], 2, "--push nowhere: give OWNER/NAME"),
        (["--ckpt", "{tmp}/last.ckpt", "--out", "{tmp}/o", "--public"], 2, "give --push OWNER/NAME too"),
        (["--ckpt", "{tmp}/last.ckpt", "--out", "{tmp}/o", "--weights", "long_term"], 1, "--weights long_term"),
        (["--ckpt", "{tmp}/foreign.ckpt", "--out", "{tmp}/o"], 1, "foreign.ckpt was not written by secura fit"),
        (["--ckpt", "{tmp}/half.ckpt", "--out", "{tmp}/o"], 1, "secura merge: --ckpt: {tmp}/half.ckpt is damaged"),
    ],
)
def test_bad_input_is_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-none"])
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:900])
    assert main(["merge", *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)]) == code
    told = capsys.readouterr().err.strip().splitlines()
    assert [line for line in told if line.startswith("secura")] == [
        line for line in told if line.startswith("secura merge: ")
    ]
    assert sum(message.replace("{tmp}", str(tmp_path)) in line for line in told) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "foreign.ckpt", "half.ckpt"}


def test_changed_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_folder(tmp_path / "base")
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-none"])
    base_folder(base, seed=5)
    assert main(["merge", "--ckpt", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "o")]) == 1
    assert "other weights" in capsys.readouterr().err


def test_biases_that_the_model_has_no_place_for_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-row-detached-bias"])
    assert main(["merge", "--ckpt", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "o")]) == 1
    assert "14 modules that have none" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_official_norm_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "last.ckpt", base, SECURAConfig(c=8, a=12, norm="official"))
    assert main(["merge", "--ckpt", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "o")]) == 1
    assert "no weight computes the same" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
