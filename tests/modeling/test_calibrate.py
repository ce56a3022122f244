"""Calibration: exact statistics block by block, text from three sources, and a cache that is used and never stale."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from secura_lightning.adapters import AdapterSet, inject
from secura_lightning.adapters.lora_null import LoRANullConfig, NullLayer
from secura_lightning.data.encode import encode_texts
from secura_lightning.data.rows import Row
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.modeling import calibrate as module
from secura_lightning.modeling.calibrate import (
    Calibration,
    SelfCalibration,
    TaskCalibration,
    TextCalibration,
    calibrate,
)
from secura_lightning.modeling.gram import count_steps, stream_grams, transformer_blocks
from secura_lightning.modeling.sample import sample
from tests.evaluation.tiny import ListTask, byte_tokenizer, chain_llama, tiny_llama

TOKENIZER = byte_tokenizer()
SEQUENCES = [list(range(3, 3 + n)) for n in (9, 4, 12, 7, 1)]


def linears(model: nn.Module, head: bool = False) -> dict[str, nn.Module]:
    named = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    return {name: m for name, m in named.items() if head or name != "lm_head"}


def exact_grams(model: PreTrainedModel, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """One unpadded sequence at a time, through the whole model."""
    grams: dict[str, Tensor] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].double().flatten(0, 1)
            grams[name] = grams.get(name, torch.zeros(())) + x.t() @ x

        return add

    hooks = [m.register_forward_pre_hook(hook(name)) for name, m in layers.items()]
    with torch.no_grad():
        for ids in SEQUENCES:
            model(torch.tensor([ids]), use_cache=False)
    for handle in hooks:
        handle.remove()
    return grams


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def gemma2() -> PreTrainedModel:
    """Its blocks take different masks: a window of 4 tokens in every other one."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("build", [tiny_llama, gpt2, gemma2], ids=lambda f: f.__name__)
def test_streamed_moments_are_those_of_whole_unpadded_passes(build, batch_size: int) -> None:  # type: ignore[no-untyped-def]
    model = build()
    layers, got, steps = linears(model, head=True), {}, []
    expected = exact_grams(model, layers)

    def take(names: list[str], gram: Tensor) -> None:
        got.update(dict.fromkeys(names, gram))

    stream_grams(model, layers, SEQUENCES, take, batch_size, progress=steps.append)
    assert got.keys() == expected.keys()
    for name, gram in got.items():
        assert gram.dtype == torch.float64
        torch.testing.assert_close(gram, expected[name], rtol=1e-4, atol=1e-4 * expected[name].abs().max().item())
    assert sum(steps) == count_steps(model, layers, len(SEQUENCES), batch_size)
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


@torch.no_grad()
def test_layers_of_one_input_share_one_matrix_and_a_block_is_done_before_the_next_begins() -> None:
    model, groups = tiny_llama(), {}
    second = transformer_blocks(model, linears(model))[1]
    ran: list[int] = []
    handle = second.register_forward_hook(lambda *_: ran.append(1))

    def take(names: list[str], gram: Tensor) -> None:
        groups[tuple(names)] = len(ran)

    stream_grams(model, linears(model), SEQUENCES, take, batch_size=2)
    handle.remove()
    block = "model.layers.0."
    assert [names for names, before in groups.items() if not before] == [
        tuple(block + name for name in names)
        for names in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        )
    ]
    assert len(ran) == 3  # every batch ran once through the block


@torch.no_grad()
def test_blocks_behind_the_last_wanted_layer_do_not_run() -> None:
    model = tiny_llama()
    wanted = {"q": model.model.layers[0].self_attn.q_proj}
    handle = model.model.layers[1].register_forward_hook(lambda *_: pytest.fail("the second block ran"))
    stream_grams(model, wanted, SEQUENCES, lambda *_: None)
    handle.remove()


@torch.no_grad()
def test_a_layer_that_no_text_reaches_is_named() -> None:
    model = tiny_llama()
    layers = {"idle": nn.Linear(4, 4), "q": model.model.layers[0].self_attn.q_proj}
    with pytest.raises(SecuraError, match="no text reached idle"):
        stream_grams(model, layers, SEQUENCES, lambda *_: None)


# -------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def test_samples_follow_the_models_distribution() -> None:
    model = tiny_llama(initializer_range=0.1)
    found = sample(model, TOKENIZER, 3000, 2, temperature=0.5, batch_size=500)
    counts = Counter(ids[1] for ids in found)
    chances = (model(torch.tensor([[0]])).logits[0, -1] / 0.5).softmax(-1)
    observed = torch.tensor([counts[i] / 3000 for i in range(259)])
    assert (observed - chances).abs().sum() < 0.3  # half of it is the total variation distance


@torch.no_grad()
def test_samples_end_where_the_model_ends_them() -> None:
    model = chain_llama({"<s>": "a", "a": "b", "b": "c"})  # then end of sequence
    model.lm_head.weight.mul_(1e4)  # certain
    for ids in sample(model, TOKENIZER, 5, 20, batch_size=2):
        assert TOKENIZER.decode(ids) == "<s>abc</s>"
    assert {len(ids) for ids in sample(model, TOKENIZER, 3, 3)} == {3}


@torch.no_grad()
def test_cached_steps_give_the_same_tokens_as_whole_passes() -> None:
    model = tiny_llama()
    found = sample(model, TOKENIZER, 4, 12, temperature=1e-4)  # almost greedy: the draw is the largest logit
    for ids in found:
        best = model(torch.tensor([ids])).logits[0, :-1].argmax(-1)
        assert best.tolist() == ids[1:]


@torch.no_grad()
def test_sampling_depends_on_its_seed_alone_and_leaves_the_random_state() -> None:
    model = tiny_llama()
    state = torch.get_rng_state()
    one = sample(model, TOKENIZER, 3, 8, seed=1)
    torch.rand(3)
    assert sample(model, TOKENIZER, 3, 8, seed=1) == one
    assert sample(model, TOKENIZER, 3, 8, seed=2) != one
    torch.set_rng_state(state)
    sample(model, TOKENIZER, 3, 8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------- calibrating


def adapted(seed: int = 0) -> AdapterSet:
    return inject(tiny_llama(), LoRANullConfig(rank=4), seed=seed)


def from_text(
    tmp_path: Path, text: str = "one two three\n\nfour five six\n\nseven", **settings: object
) -> TextCalibration:
    path = tmp_path / "text.txt"
    path.write_text(text)
    return TextCalibration(path=str(path), **{"max_length": 8, "cache": str(tmp_path / "cache"), **settings})  # type: ignore[arg-type]


def count_measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    runs: list[int] = []
    original = stream_grams

    def counted(*args: object, **kwargs: object) -> None:
        runs.append(1)
        original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "stream_grams", counted)
    return runs


def test_every_layer_gets_the_null_space_of_its_own_input(tmp_path: Path) -> None:
    adapters = adapted()
    adapters.model.train()
    state, ids = torch.get_rng_state(), torch.tensor([[5, 6, 7]])
    with adapters.disabled():
        before = adapters.model(ids).logits
    calibrate(adapters, TOKENIZER, from_text(tmp_path), "base")
    assert all(layer.calibrated for layer in adapters.layers.values())
    assert torch.equal(adapters.model(ids).logits, before)  # still the base
    assert torch.equal(torch.get_rng_state(), state)
    assert adapters.model.training
    assert not any(p.grad_fn for p in adapters.trainable_parameters())
    sequences = from_text(tmp_path).sequences(adapters.model, TOKENIZER, 0)  # type: ignore[arg-type]
    for name, layer in adapters.layers.items():
        moved: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, moved=moved: moved.append(args[0].detach()[0]))
        for sequence in sequences:
            adapters.model(torch.tensor([sequence]))
        handle.remove()
        x = torch.cat(moved).double()
        assert isinstance(layer, NullLayer)
        basis = torch.linalg.qr(layer.lora_A.double().t()).Q
        share = (x @ basis).norm() / x.norm()
        smallest = torch.linalg.eigvalsh(x.t() @ x)[:4].clamp_min(0).sum().sqrt() / x.norm()
        torch.testing.assert_close(share, smallest, rtol=0.02, atol=1e-5, msg=name)
        torch.testing.assert_close(layer.leakage.double(), smallest, rtol=0.02, atol=1e-5, msg=name)


def test_a_second_run_takes_the_start_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, one, two = count_measurements(monkeypatch), adapted(), adapted()
    calibrate(one, TOKENIZER, from_text(tmp_path), "base")
    calibrate(two, TOKENIZER, from_text(tmp_path), "base")
    assert len(runs) == 1
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    assert all(layer.calibrated for layer in two.layers.values())


@pytest.mark.parametrize("change", ["text", "samples", "base", "seed", "rank", "damage", "no cache"])
def test_the_cache_is_used_for_the_very_same_calibration_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    calibrate(adapted(), TOKENIZER, from_text(tmp_path), "base")
    (file,) = (tmp_path / "cache").iterdir()
    if change == "damage":
        file.write_bytes(file.read_bytes()[:100])
    runs = count_measurements(monkeypatch)
    settings = {"samples": {"samples": 2}, "no cache": {"cache": None}}.get(change, {})
    text = "other text" if change == "text" else "one two three\n\nfour five six\n\nseven"
    adapters = inject(tiny_llama(), LoRANullConfig(rank=3 if change == "rank" else 4))
    source = from_text(tmp_path, text, **settings)  # type: ignore[arg-type]
    calibrate(adapters, TOKENIZER, source, "other" if change == "base" else "base", int(change == "seed"))
    assert len(runs) == 1


def test_a_loaded_checkpoint_is_not_calibrated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = adapted(), adapted(seed=5)
    calibrate(one, TOKENIZER, from_text(tmp_path), "base")
    two.load_state_dict(one.state_dict())
    runs = count_measurements(monkeypatch)
    calibrate(two, TOKENIZER, from_text(tmp_path, "quite another text"), "other")
    assert not runs
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_the_models_own_text_calibrates_it_repeatably() -> None:
    sets = [adapted(), adapted()]
    for adapters in sets:
        calibrate(adapters, TOKENIZER, SelfCalibration(samples=5, max_length=10, batch_size=2, cache=None), seed=3)
    one, two = (adapters.state_dict() for adapters in sets)
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = adapted()
    calibrate(other, TOKENIZER, SelfCalibration(samples=5, max_length=10, batch_size=2, cache=None), seed=4)
    assert not all(torch.equal(one[key], other.state_dict()[key]) for key in one)


# ------------------------------------------------------------------------------------------------------------ sources


def test_text_is_cut_into_windows_that_hold_every_token(tmp_path: Path) -> None:
    texts = ["one two three", "four five six", "seven"]
    windows = from_text(tmp_path, samples=99).sequences(tiny_llama(), TOKENIZER, 0)
    assert max(map(len, windows)) == 8
    assert list(chain(*windows)) == list(chain(*encode_texts(TOKENIZER, texts)))
    some = from_text(tmp_path, samples=2)
    assert len(some.sequences(tiny_llama(), TOKENIZER, 0)) == 2
    assert len({str(some.sequences(tiny_llama(), TOKENIZER, seed)) for seed in range(9)}) > 3


@pytest.mark.parametrize("is_text", [False, True])
def test_task_rows_are_prompts_with_answers_or_documents(is_text: bool) -> None:
    task = ListTask("facts", [Row("0", "two plus two is", "four"), Row("1", "", "a document")][is_text:][:1])
    task.is_text = is_text
    (ids,) = TaskCalibration(task=task, cache=None).sequences(tiny_llama(), TOKENIZER, 0)
    assert TOKENIZER.decode(ids) == ("<s>a document</s>" if is_text else "<s>two plus two is four</s>")


def test_sequences_fit_the_models_context(tmp_path: Path) -> None:
    model = tiny_llama(max_position_embeddings=16)
    assert SelfCalibration(max_length=512).length(model) == 16
    assert max(map(len, from_text(tmp_path, "x" * 90, max_length=512).sequences(model, TOKENIZER, 0))) == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfCalibration(samples=0), r"model\.calibration\.samples is 0"),
        (lambda: SelfCalibration(max_length=1), r"model\.calibration\.max_length is 1"),
        (lambda: SelfCalibration(temperature=0), r"model\.calibration\.temperature is 0"),
    ],
)
def test_bad_settings_name_the_key(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(("name", "message"), [("none.txt", "none.txt"), ("empty.txt", "holds no text")])
def test_missing_text_is_one_clear_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    source: Calibration = TextCalibration(path=str(tmp_path / name), cache=None)
    with pytest.raises(SecuraError, match=rf"model\.calibration: .*{message}"):
        calibrate(adapted(), TOKENIZER, source)
