"""Prompts are never trained on, answers never cut, padding never seen."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from secura_lightning.data.encode import (
    IGNORED,
    Encoded,
    collate,
    encode_prompts,
    encode_rows,
    encode_texts,
    pack,
)
from secura_lightning.data.rows import Row
from secura_lightning.errors import SecuraError
from tests.evaluation.tiny import byte_tokenizer

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60)


def trained_text(tokenizer, encoded: Encoded) -> str:
    return tokenizer.decode(encoded.ids[encoded.n_prompt :])


def test_answer_and_end_of_sequence_are_trained_and_nothing_else(tokenizer) -> None:
    encoded = encode_rows(tokenizer, [Row("1", "What is 2 + 3?", "The sum is 5.")], 64)[0]
    assert encoded.ids[0] == tokenizer.bos_token_id
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert trained_text(tokenizer, encoded) == " The sum is 5." + tokenizer.eos_token
    assert tokenizer.decode(encoded.ids[1 : encoded.n_prompt]) == "What is 2 + 3?"


@given(prompt=TEXT, answer=TEXT.filter(str.strip), room=st.integers(8, 40))
def test_training_continues_exactly_the_prompt_that_generation_sees(
    tokenizer, prompt: str, answer: str, room: int
) -> None:
    row = Row("1", prompt.rstrip(), answer)
    encoded = encode_rows(tokenizer, [row], 1000)[0]
    assert list(encoded.ids[: encoded.n_prompt]) == encode_prompts(tokenizer, [row.prompt])[0]
    assert encoded.n_trained == sum(label != IGNORED for label in collate([encoded], 0)["labels"][0, 1:].tolist())
    length = len(encoded.ids) - encoded.n_prompt + room
    cut = encode_rows(tokenizer, [row], length)[0]
    assert len(cut.ids) <= length
    assert list(cut.ids[cut.n_prompt :]) == list(encoded.ids[encoded.n_prompt :])
    assert cut.ids[0] == tokenizer.bos_token_id
    assert cut.truncated == len(encoded.ids) - len(cut.ids)


def variants() -> list[PreTrainedTokenizerFast]:
    """With and without beginning and end of sequence; one whose tokens reach over white space."""
    made = []
    for bos, eos in ((True, True), (False, True), (False, False)):
        tokenizer = byte_tokenizer()
        tokenizer.bos_token = "<s>" if bos else None
        tokenizer.eos_token = "</s>" if eos else None
        made.append(tokenizer)
    merging = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["a", "b", " ", "a ", " b"])}, merges=[
        ("a", " "), (" ", "b"),
    ]))  # fmt: skip
    return [*made, PreTrainedTokenizerFast(tokenizer_object=merging)]


VARIANTS = variants()


@settings(deadline=None)
@given(
    texts=st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=5),
    separator=st.sampled_from(["", " ", "\n", "\n\nAnswer: "]),
    length=st.integers(1, 80),
    which=st.integers(0, 2),
)
def test_rows_together_are_rows_alone_and_every_answer_is_whole_or_refused(
    texts: list[tuple[str, str]], separator: str, length: int, which: int
) -> None:
    tokenizer = VARIANTS[which]
    rows = [Row(str(i), prompt, answer) for i, (prompt, answer) in enumerate(texts)]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    wanted = [[*tokenizer(separator + row.answer)["input_ids"], *end] for row in rows]  # bytes never merge
    if max(map(len, wanted)) >= length:
        with pytest.raises(SecuraError, match=r"row \d+: its answer takes \d+ of data.max_length"):
            encode_rows(tokenizer, rows, length, separator)
        return
    found = encode_rows(tokenizer, rows, length, separator)
    assert found == [encode_rows(tokenizer, [row], length, separator)[0] for row in rows]
    for row, encoded, answer in zip(rows, found, wanted, strict=True):
        prompt = encode_prompts(tokenizer, [row.prompt])[0]
        assert list(encoded.ids[encoded.n_prompt :]) == answer
        assert len(encoded.ids) <= length
        assert encoded.truncated == len(prompt) - encoded.n_prompt
        kept = list(encoded.ids[: encoded.n_prompt])
        whole = kept == prompt
        assert whole == (encoded.truncated == 0)
        first = int(tokenizer.bos_token_id is not None and len(kept) > 1)
        assert kept[first:] == prompt[len(prompt) - len(kept) + first :]
        labels = collate([encoded], 0)["labels"][0]
        assert int((labels[1:] != IGNORED).sum()) == encoded.n_trained > 0 or len(encoded.ids) == 1


@settings(deadline=None)
@given(st.text("ab ", max_size=8), st.text("ab ", max_size=8).filter(str.strip), st.sampled_from(["", " "]))
def test_a_token_over_the_border_never_changes_the_prompt(prompt: str, answer: str, separator: str) -> None:
    tokenizer = VARIANTS[3]
    encoded = encode_rows(tokenizer, [Row("1", prompt, answer)], 100, separator)[0]
    assert list(encoded.ids[: encoded.n_prompt]) == tokenizer(prompt)["input_ids"]
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.ids)) == prompt + separator + answer


def test_an_answer_without_tokens_is_refused() -> None:
    with pytest.raises(SecuraError, match="row 3: the tokenizer makes no token of the answer 'xyz'"):
        encode_rows(VARIANTS[3], [Row("3", "a", "xyz")], 10, "")


def test_empty_and_oversized_answers_are_refused_with_the_row(tokenizer) -> None:
    with pytest.raises(SecuraError, match="row 7: the answer is empty"):
        encode_rows(tokenizer, [Row("7", "Hello", "  ")], 64)
    with pytest.raises(SecuraError, match=r"row 8: .*raise data.max_length above"):
        encode_rows(tokenizer, [Row("8", "Hello", "a long answer " * 20)], 16)


def test_padding_carries_no_label_and_no_attention(tokenizer) -> None:
    short, long = encode_rows(tokenizer, [Row("1", "Say it.", text) for text in ("no", "yes and yes and yes")], 64)
    batch = collate([short, long], tokenizer.pad_token_id)
    width = len(short.ids)
    assert (batch["labels"][0, width:] == IGNORED).all()
    assert (batch["attention_mask"][0, width:] == 0).all()
    assert (batch["input_ids"][0, width:] == tokenizer.pad_token_id).all()


def test_packing_keeps_the_order_and_drops_less_than_a_block(tokenizer) -> None:
    documents = encode_texts(tokenizer, ["The sky is blue.", "Grass is green.", "Snow is white."])
    stream = [token for document in documents for token in document]
    blocks = pack(documents, 6)
    assert [token for block in blocks for token in block.ids] == stream[: len(stream) // 6 * 6]
    assert all(block.n_trained == 5 for block in blocks)
