import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from secura_lightning.data.encode import encode_answers, encode_prompts
from secura_lightning.data.rows import Row
from secura_lightning.evaluation.choices import choice_likelihoods, pick_choices
from tests.evaluation.tiny import chain_llama

ROWS = [
    Row("0", "Which is red?", "rose", ("rose", "sky", "a very green tree")),
    Row("1", "Up or down", "up", ("up", "down")),
    Row("2", "?", "b", ("a", "b", "c", "d")),
    Row("3", "A longer question that fills more of the batch", "yes", ("yes",)),
]


def by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, row: Row, choice: str) -> float:
    """One pair at a time, without padding or cache."""
    prompt, answer = encode_prompts(tokenizer, [row.prompt])[0], encode_answers(tokenizer, [(row.prompt, choice)])[0]
    with torch.no_grad():
        scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_likelihoods_equal_one_pair_at_a_time(
    batch_size: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = choice_likelihoods(model, tokenizer, ROWS, batch_size=batch_size)
    for row, values in zip(ROWS, found, strict=True):
        np.testing.assert_allclose(values, [by_hand(model, tokenizer, row, c) for c in row.choices], rtol=1e-5)


def test_single_token_choices_need_one_forward(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    rows = [Row("0", "Which one?", "a", ("a", "b", "c")), Row("1", "And now, which", "c", ("a", "b", "c"))]
    found = choice_likelihoods(model, tokenizer, rows, form="")
    assert len(calls) == 1
    prompt = torch.tensor([encode_prompts(tokenizer, [rows[1].prompt])[0]])
    with torch.no_grad():
        scores = model(prompt).logits[0, -1].log_softmax(-1)
    np.testing.assert_allclose(found[1], [float(scores[tokenizer(c)["input_ids"][0]]) for c in "abc"], rtol=1e-5)


def test_what_rows_and_choices_begin_with_is_read_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    instruction = "Answer with one of the words below"
    rows = [
        Row("0", f"{instruction}: red?", "a rose", ("a rose", "a sky", "a")),
        Row("1", f"{instruction}, is it up or down?", "go up", ("go up", "go down")),
        Row("2", instruction, "yes", ("yes", "no")),
    ]
    shapes = []
    model.model.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(tuple(output[0].shape[:2])), with_kwargs=True
    )
    found = choice_likelihoods(model, tokenizer, rows)
    # The instruction but for the tokens whose logits are needed; the rows behind it; the choices' other tokens.
    assert shapes[0] == (1, len(instruction) + 1 - len(" go "))
    assert shapes[1] == (3, len(", is it up or down?") + len(" go ") + len(" go "))
    assert shapes[2][1] == len(" rose") - 1
    model.model._forward_hooks.clear()
    for row, values in zip(rows, found, strict=True):
        np.testing.assert_allclose(values, [by_hand(model, tokenizer, row, c) for c in row.choices], rtol=1e-5)


def test_sliding_window_and_soft_capping_are_respected(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, max_position_embeddings=96, initializer_range=0.3,
        final_logit_softcapping=3.0, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    found = choice_likelihoods(model, tokenizer, ROWS)
    for row, values in zip(ROWS, found, strict=True):
        np.testing.assert_allclose(values, [by_hand(model, tokenizer, row, c) for c in row.choices], rtol=1e-4)


def test_picks_what_the_model_would_say(tokenizer: PreTrainedTokenizerFast) -> None:
    model = chain_llama({"?": " ", " ": "d", "d": "o", "o": "g"})
    rows = [Row("0", "pet?", "dog", ("cat", "dog", "dig")), Row("1", "pet?", "dog", ("dug", "cat"))]
    assert pick_choices(model, tokenizer, rows) == ["dog", "dug"]


def test_normalising_changes_sides_where_length_decides(tokenizer: PreTrainedTokenizerFast) -> None:
    model = chain_llama({})  # every character costs the same, so that the shorter choice is always more probable
    rows = [Row("0", "q", "aaaa", ("aaaa", "b"))]
    values = choice_likelihoods(model, tokenizer, rows)[0]
    assert pick_choices(model, tokenizer, rows) == ["b"]
    assert values[0] / 4 > values[1] / 1  # the separator's token weighs less on the longer one
    assert pick_choices(model, tokenizer, rows, normalise=True) == ["aaaa"]


def test_first_of_equals_wins(tokenizer: PreTrainedTokenizerFast) -> None:
    model = chain_llama({})
    rows = [Row("0", "q", "d", ("c", "d", "c")), Row("1", "q", "d", ("d", "c"))]
    assert pick_choices(model, tokenizer, rows) == ["c", "d"]


def test_long_prompt_is_cut_on_the_left_and_choices_never(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    choices = ("one", "another")
    long = Row("0", "z" * 300 + " which?", "one", choices)
    room = 96 - 1 - len(" another")
    short = Row("1", long.prompt[-room:], "one", choices)
    found = choice_likelihoods(model, tokenizer, [long, short])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    assert np.isfinite(found[0]).all()


def test_a_batch_that_is_read_in_parts_scores_as_rows_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [Row(str(n), f"Question {n}: " * (1 + n % 4), "yes", ("yes", "yes, so", "no")) for n in range(60)]
    assert sum(len(row.prompt) for row in rows) > 1280  # more than a CPU reads in one pass
    together = choice_likelihoods(model, tokenizer, rows, batch_size=1000)
    for row, values in zip(rows, together, strict=True):
        assert values == pytest.approx(choice_likelihoods(model, tokenizer, [row])[0], abs=1e-4)
