"""The shipped tokenizer: exact round trips, digits one by one, and made by the command that is named."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

import secura_lightning.data.pocket as pocket
from secura_lightning.data.pocket import corpus, german, tokenizer

FOLDER = Path(pocket.__file__).parent / "model"


@pytest.fixture(scope="module")
def shipped() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


def test_special_tokens_and_size_agree_with_the_model(shipped):
    config = AutoConfig.from_pretrained(FOLDER)
    assert len(shipped) == config.vocab_size == tokenizer.VOCABULARY == 1280
    assert (shipped.pad_token_id, shipped.bos_token_id, shipped.eos_token_id) == (0, 1, 2)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert shipped.model_max_length == config.max_position_embeddings == 512
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    "text",
    [
        "  two  spaces ",
        "tab\tand\nlines\n\n",
        "Über Straßen, für 3,50 €",
        "漢字 🙂 é",
        "don't , stop . 3.14",
        "a\r\nb",
        " ",
    ],
)
def test_any_text_comes_back_exactly(shipped, text):
    assert shipped.decode(shipped(text)["input_ids"]) == text


def test_the_corpus_and_german_come_back_exactly(shipped):
    for text in [*corpus.sample(500, seed=11), *german.lexicon()]:
        assert shipped.decode(shipped(text)["input_ids"]) == text


def test_nothing_is_added_and_digits_stand_alone(shipped):
    assert shipped("")["input_ids"] == []
    assert shipped.tokenize("2024 + 17") == ["2", "0", "2", "4", "Ġ+", "Ġ1", "7"]


def test_a_separator_between_prompt_and_answer_leaves_the_prompt_as_it_is(shipped):
    prompt = shipped("Question: What is 3 + 4?\nAnswer:")["input_ids"]
    assert shipped("Question: What is 3 + 4?\nAnswer: 7")["input_ids"][: len(prompt)] == prompt


def test_documents_and_german_words_are_short(shipped):
    lengths = [len(shipped(text)["input_ids"]) for text in corpus.sample(1000, seed=11)]
    assert sum(lengths) / len(lengths) < 36
    assert max(lengths) < 160
    german_lengths = [len(shipped(" " + word)["input_ids"]) for word in german.lexicon()]
    assert sum(german_lengths) / len(german_lengths) < 4


@pytest.mark.slow
def test_the_command_makes_the_shipped_files_again(tmp_path):
    assert tokenizer.main([str(tmp_path)]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_the_command_without_a_folder_says_how_it_is_used(capsys):
    assert tokenizer.main([]) == 2
    assert "OUT_DIR" in capsys.readouterr().err
