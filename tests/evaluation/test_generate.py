import warnings
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from secura_lightning.data.encode import encode_prompts
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation.batching import lay_together
from secura_lightning.evaluation.generate import generate
from tests.evaluation.tiny import chain_llama, tiny_llama

PROMPTS = ["hello there", "a", "what is this thing", "", "x y z", "hello there", "ü" * 12]


def test_stops_at_end_of_sequence_and_strips_it(tokenizer: PreTrainedTokenizerFast) -> None:
    model = chain_llama({"a": " ", " ": "b", "b": "c", "x": "x"})
    answers = generate(model, tokenizer, ["say a", "no", "x", "b"], max_new_tokens=5)
    assert answers == ["bc", "", "xxxxx", "c"]


def test_stops_at_a_stop_string_and_leaves_it_out(tokenizer: PreTrainedTokenizerFast) -> None:
    model = chain_llama({"a": "b", "b": "c", "c": "d", "d": "a"})  # for ever
    read = []
    model.register_forward_hook(lambda module, args, output: read.append(output.logits.shape[0]))
    answers = generate(model, tokenizer, ["a", "c", "b"], max_new_tokens=20, stop=["cd", "x"])
    assert answers == ["b", "dab", ""]
    assert len(read) == 5  # the longest answer with its stop string; nothing is generated after it
    assert generate(model, tokenizer, ["x"], max_new_tokens=3, stop=["cd"]) == [""]
    with pytest.raises(ConfigError, match="stop string is empty"):
        generate(model, tokenizer, ["a"], max_new_tokens=3, stop=[""])


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_result_does_not_depend_on_the_batch(
    batch_size: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    alone = [generate(model, tokenizer, [prompt], 10)[0] for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, 10, batch_size) == alone
    assert len(set(alone)) == len(PROMPTS) - 1  # two prompts are equal, the others must differ


def test_equals_greedy_by_hand_without_cache(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompts(tokenizer, [PROMPTS[2]])[0]
    start = len(ids)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    wanted = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert generate(model, tokenizer, [PROMPTS[2]], 8) == [wanted]


def test_settings_of_the_model_neither_change_answers_nor_warn(tokenizer: PreTrainedTokenizerFast, caplog) -> None:
    plain = tiny_llama()
    wanted = generate(plain, tokenizer, PROMPTS, 12)
    model = tiny_llama()
    settings = model.generation_config
    settings.update(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.7, max_length=20, use_cache=False)
    model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, tokenizer, PROMPTS, 12) == wanted
    assert not caplog.records
    assert model.generation_config is settings
    assert settings.repetition_penalty == 1.7
    assert model.config.use_cache is False


def test_ends_that_the_model_lists_end_an_answer_and_are_no_part_of_it(tokenizer: PreTrainedTokenizerFast) -> None:
    model = chain_llama({"a": "b", "b": "c", "c": "d"})
    end_of_turn = tokenizer("c")["input_ids"][0]
    model.generation_config.eos_token_id = [1, end_of_turn]
    assert generate(model, tokenizer, ["a"], 8) == ["b"]


def test_mode_and_random_state_are_restored_module_by_module(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.train()
    model.model.layers[0].eval()  # part of the model rests in eval mode
    flags = [module.training for module in model.modules()]
    torch.manual_seed(11)
    before = torch.get_rng_state()
    generate(model, tokenizer, PROMPTS, 3)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), before)


def test_mode_is_restored_after_a_failure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.train()
    settings = model.generation_config

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, PROMPTS, 3, progress=stop)
    assert model.training
    assert model.generation_config is settings


def test_dropout_is_off_while_generating(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(attention_dropout=0.5)
    wanted = generate(model, tokenizer, PROMPTS, 6)
    assert generate(model.train(), tokenizer, PROMPTS, 6) == wanted


def test_prompt_longer_than_the_context_keeps_its_end(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ending = "the end of it is what counts"
    room = 96 - 4 - 1  # context, new tokens, beginning of sequence
    long = "z" * 200 + ending
    assert generate(model, tokenizer, [long], 4) == generate(model, tokenizer, [long[-room:]], 4)
    assert generate(model, tokenizer, [long], 4) != generate(model, tokenizer, [long[:room]], 4)


def test_progress_counts_every_prompt(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    done: list[int] = []
    generate(model, tokenizer, PROMPTS, 2, batch_size=3, progress=done.append)
    assert sum(done) == len(PROMPTS) == 7
    assert max(done) <= 3


def test_no_prompts_no_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert generate(model, tokenizer, [], 2) == []


def test_a_batch_that_is_read_in_parts_and_shrinks_says_what_each_row_says_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.generation_config.eos_token_id = list(range(0, 259, 9))  # rows end at different steps
    prompts = ["x" * (n % 7) + f"{n} and " * (1 + n % 8) for n in range(48)]
    assert sum(map(len, prompts)) > 1280  # more than a CPU reads in one pass
    sizes: list[int] = []
    plain = model.forward

    def counted(ids: torch.Tensor, **inputs: Any) -> Any:
        sizes.append(len(ids))
        return plain(ids, **inputs)

    alone = [generate(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    model.forward = lambda input_ids, **inputs: counted(input_ids, **inputs)  # type: ignore[method-assign]
    assert generate(model, tokenizer, prompts, 12, batch_size=64) == alone
    assert len({len(answer) for answer in alone}) > 3
    steps = sizes[sizes.index(48) :]  # after the parts
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < 48


@pytest.mark.parametrize("sliding", [False, True])
def test_rows_that_take_the_place_of_ended_ones_say_what_they_say_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, sliding: bool
) -> None:
    talker = tiny_gemma() if sliding else model
    talker.generation_config.eos_token_id = list(range(0, 259, 9))  # rows end at different steps
    prompts = [f"{n} and " * (1 + n % 8) for n in range(40)]
    alone = [generate(talker, tokenizer, [prompt], 12)[0] for prompt in prompts]
    laid: list[int] = []

    def counted(model: Any, parts: Any) -> Any:
        laid.append(len(parts))
        return lay_together(model, parts)

    monkeypatch.setattr("secura_lightning.evaluation.generate.lay_together", counted)
    done: list[int] = []
    assert generate(talker, tokenizer, prompts, 12, batch_size=8, progress=done.append) == alone
    assert bool(laid) is not sliding  # a sliding window's cache does not hold all tokens
    assert sum(done) == 40


def tiny_gemma() -> Gemma2ForCausalLM:
    """Every second layer sees eight tokens."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=96, sliding_window=8, initializer_range=0.4,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()
