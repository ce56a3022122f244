"""Prompts are never trained on, answers never cut, padding never seen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secura_lightning.data.encode import IGNORED, Encoded, collate, encode_prompt, encode_row, encode_text, pack
from secura_lightning.data.rows import Row
from secura_lightning.errors import SecuraError

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60)


def trained_text(tokenizer, encoded: Encoded) -> str:
    return tokenizer.decode(encoded.ids[encoded.n_prompt :])


def test_answer_and_end_of_sequence_are_trained_and_nothing_else(tokenizer) -> None:
    encoded = encode_row(tokenizer, Row("1", "What is 2 + 3?", "The sum is 5."), 64)
    assert encoded.ids[0] == tokenizer.bos_token_id
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert trained_text(tokenizer, encoded) == " The sum is 5." + tokenizer.eos_token
    assert tokenizer.decode(encoded.ids[1 : encoded.n_prompt]) == "What is 2 + 3?"


@given(prompt=TEXT, answer=TEXT.filter(str.strip), room=st.integers(8, 40))
def test_training_continues_exactly_the_prompt_that_generation_sees(
    tokenizer, prompt: str, answer: str, room: int
) -> None:
    row = Row("1", prompt.rstrip(), answer)
    encoded = encode_row(tokenizer, row, 1000)
    assert list(encoded.ids[: encoded.n_prompt]) == encode_prompt(tokenizer, row.prompt)
    assert encoded.n_trained == sum(label != IGNORED for label in collate([encoded], 0)["labels"][0, 1:].tolist())
    length = len(encoded.ids) - encoded.n_prompt + room
    cut = encode_row(tokenizer, row, length)
    assert len(cut.ids) <= length
    assert list(cut.ids[cut.n_prompt :]) == list(encoded.ids[encoded.n_prompt :])
    assert cut.ids[0] == tokenizer.bos_token_id
    assert cut.truncated == len(encoded.ids) - len(cut.ids)


def test_empty_and_oversized_answers_are_refused_with_the_row(tokenizer) -> None:
    with pytest.raises(SecuraError, match="row 7: the answer is empty"):
        encode_row(tokenizer, Row("7", "Hello", "  "), 64)
    with pytest.raises(SecuraError, match=r"row 8: .*raise data.max_length above"):
        encode_row(tokenizer, Row("8", "Hello", "a long answer " * 20), 16)


def test_padding_carries_no_label_and_no_attention(tokenizer) -> None:
    short, long = (encode_row(tokenizer, Row("1", "Say it.", text), 64) for text in ("no", "yes and yes and yes"))
    batch = collate([short, long], tokenizer.pad_token_id)
    width = len(short.ids)
    assert (batch["labels"][0, width:] == IGNORED).all()
    assert (batch["attention_mask"][0, width:] == 0).all()
    assert (batch["input_ids"][0, width:] == tokenizer.pad_token_id).all()


def test_packing_keeps_the_order_and_drops_less_than_a_block(tokenizer) -> None:
    documents = [encode_text(tokenizer, text) for text in ("The sky is blue.", "Grass is green.", "Snow is white.")]
    stream = [token for document in documents for token in document]
    blocks = pack(documents, 6)
    assert [token for block in blocks for token in block.ids] == stream[: len(stream) // 6 * 6]
    assert all(block.n_trained == 5 for block in blocks)
