"""Training, generation and choices read what the chat template writes; the answer ends once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from secura_lightning.data.encode import encode_rows, render_prompts
from secura_lightning.data.prompt import PromptFormat
from secura_lightning.data.rows import Row
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.data.tokenise import Tokeniser
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.evaluation.choices import choice_likelihoods
from secura_lightning.evaluation.evaluate import evaluate_task
from secura_lightning.evaluation.generate import generate
from tests.data.chat_templates import TEMPLATES, chat_tokenizer
from tests.evaluation.tiny import ListTask, chain_llama, tiny_llama

TOKENIZERS = {name: chat_tokenizer(name) for name in TEMPLATES}
# Templates trim messages; marks of special tokens in a row would be read as such, as everywhere with chat templates.
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="<[|"), min_size=1)
CONTENT = WORDS.map(str.strip).filter(bool)
every_template = pytest.mark.parametrize("name", list(TEMPLATES))


def conversation(tokenizer: PreTrainedTokenizerFast, name: str, prompt: str, answer: str) -> str:
    """What the template writes of both messages, up to what ends the answer."""
    first = [{"role": "system", "content": ""}] if name == "needs_system" else []
    messages = [*first, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    end = TEMPLATES[name][2]
    return text.removesuffix("</s>").removesuffix("\n").removesuffix("\n").removesuffix(end) + end


@every_template
@settings(deadline=None, max_examples=15)
@given(prompt=CONTENT, answer=CONTENT)
def test_a_row_is_the_templates_own_conversation_and_trains_its_answer_with_one_end(
    name: str, prompt: str, answer: str
) -> None:
    tokenizer = TOKENIZERS[name]
    (row,) = encode_rows(tokenizer, [Row("1", prompt, answer)], 10_000)
    text = conversation(tokenizer, name, prompt, answer)
    wanted = tokenizer(text.removesuffix("</s>"), add_special_tokens=False)["input_ids"]
    wanted += [tokenizer.eos_token_id] * text.endswith("</s>")
    assert row.ids == wanted
    # What is not trained is what generation starts from.
    (rendered,) = render_prompts(tokenizer, [prompt])
    assert row.ids[: row.n_prompt] == rendered.ids
    end = TEMPLATES[name][2]
    assert tokenizer.decode(row.ids[row.n_prompt :]).strip(" ") == answer + end
    assert row.ids[row.n_prompt :].count(tokenizer.convert_tokens_to_ids(end)) == 1
    assert row.ids.count(tokenizer.bos_token_id) == ("bos_token" in TEMPLATES[name][0])


@every_template
def test_generation_starts_from_the_templates_generation_prompt(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    (rendered,) = render_prompts(tokenizer, ["Hello"], PromptFormat(chat=True))
    first = [{"role": "system", "content": ""}] if name == "needs_system" else []
    own = tokenizer.apply_chat_template(
        [*first, {"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    text = tokenizer.decode(rendered.ids)
    assert text.startswith(str(own))
    rest = {"thinking": "<think>\n\n</think>\n\n", "plain": "### assistant:\n"}
    assert text.removeprefix(str(own)) == rest.get(name, "")


@every_template
@settings(deadline=None, max_examples=15)
@given(prompt=CONTENT, answer=CONTENT, room=st.integers(0, 30))
def test_truncation_takes_the_prompts_own_tokens_from_the_left_and_nothing_else(
    name: str, prompt: str, answer: str, room: int
) -> None:
    tokenizer = TOKENIZERS[name]
    rows = [Row("1", prompt, answer)]
    (whole,) = encode_rows(tokenizer, rows, 10_000)
    (rendered,) = render_prompts(tokenizer, [prompt])
    fixed = rendered.head + rendered.tail
    length = len(whole.ids) - whole.n_prompt + fixed + room
    (cut,) = encode_rows(tokenizer, rows, length)
    own = rendered.ids[rendered.head : len(rendered.ids) - rendered.tail]
    assert len(cut.ids) == min(length, len(whole.ids))
    assert cut.truncated == len(whole.ids) - len(cut.ids)
    kept = own[cut.truncated :]
    tail = rendered.ids[len(rendered.ids) - rendered.tail :]
    assert cut.ids[: cut.n_prompt] == rendered.ids[: rendered.head] + kept + tail
    assert cut.ids[cut.n_prompt :] == whole.ids[whole.n_prompt :]
    special = set(tokenizer.all_special_ids)
    assert [i for i in cut.ids if i in special] == [i for i in whole.ids if i in special]
    with pytest.raises(SecuraError, match=r"the chat template .* raise data.max_length"):
        encode_rows(tokenizer, rows, length - room - 1)


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello"),
        ("qwen", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello"),
        ("llama3", "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"),
        ("gemma", "<s><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>"),  # refused
        ("mistral", "<s>[INST] Be brief.\n\nHello [/INST]"),  # ignored
    ],
)
def test_a_system_message_has_its_role_or_begins_the_users(name: str, begins: str) -> None:
    tokenizer = TOKENIZERS[name]
    (rendered,) = render_prompts(tokenizer, ["Hello"], PromptFormat(system="Be brief."))
    assert str(tokenizer.decode(rendered.ids)).startswith(begins)


def test_false_leaves_the_template_unused_and_true_wants_one() -> None:
    tokenizer = TOKENIZERS["chatml"]
    (plain,) = encode_rows(tokenizer, [Row("1", "Hello", "you")], 99, PromptFormat(chat=False))
    assert tokenizer.decode(plain.ids) == "<s>Hello you</s>"
    with pytest.raises(ConfigError, match=r"data.chat is true, but the tokenizer has no chat template"):
        PromptFormat(chat=True).frame(tiny_tokenizer_without_template())


def tiny_tokenizer_without_template() -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer("mistral")
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('never') }}", r"data.chat: the tokenizer's chat template fails \(never\)"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "does not show each message once"),
    ],
)
def test_a_template_that_cannot_serve_is_one_clear_line(template: str, message: str) -> None:
    tokenizer = tiny_tokenizer_without_template()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message):
        PromptFormat().frame(tokenizer)


def test_the_cache_knows_template_and_system_message(tmp_path: Path) -> None:
    task = ListTask("list", [Row("1", "Hello", "you")])
    folders = set()
    for name, chat, system in (("chatml", "auto", None), ("qwen", "auto", None), ("chatml", False, None),
                               ("chatml", True, "Be brief.")):  # fmt: skip
        task.chat, task.system = chat, system
        folders.add(Tokeniser(TOKENIZERS[name], 64, str(tmp_path), streaming=False).fingerprint(task))
    assert len(folders) == 4


def test_the_sequence_hands_its_setting_to_tasks_and_probe_and_keeps_it() -> None:
    task = ListTask("list", [Row("1", "Hello", "you")])
    data = SequenceDataModule(tasks=[task], batch_size=1, max_length=128, chat="auto", system="Be brief.")
    assert task.prompt_format == PromptFormat(" ", "auto", "Be brief.")
    data.lay_out(TOKENIZERS["chatml"])
    assert data.describe()["chat"] is True
    kept = data.state_dict()
    data.load_state_dict(kept)
    with pytest.raises(ConfigError, match="written with chat=False, this configuration has chat=True"):
        data.load_state_dict(kept | {"chat": False})
    with pytest.raises(ConfigError, match=r"data.system goes into the chat template"):
        SequenceDataModule(tasks=[task], chat=False, system="Be brief.")


def test_an_answer_ends_with_the_templates_turn_though_the_model_does_not_list_it() -> None:
    tokenizer = TOKENIZERS["gemma"]
    model = chain_llama({"\n": "b", "b": "c"})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    with torch.no_grad():
        model.lm_head.weight[:, tokenizer("c")["input_ids"][0]] = 0
        model.lm_head.weight[end, tokenizer("c")["input_ids"][0]] = 1.0
    assert generate(model, tokenizer, ["a"], 8) == ["bc"]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral"])
def test_choices_are_scored_after_the_rendered_prompt(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    rows = [Row("1", "Is it so?", "yes", ("yes", "no", "not")), Row("2", "Why?", "b", ("a", "b"))]
    found = choice_likelihoods(model, tokenizer, rows)
    gap = " " if name == "mistral" else ""
    for row, values in zip(rows, found, strict=True):
        (rendered,) = render_prompts(tokenizer, [row.prompt])
        for choice, value in zip(row.choices, values, strict=True):
            answer = tokenizer(gap + choice, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([rendered.ids + answer])
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert value == pytest.approx(float(scores[-len(answer) :].sum()), abs=1e-4)


def test_evaluation_renders_as_training_does() -> None:
    tokenizer = TOKENIZERS["chatml"]
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    task = ListTask("talk", [Row("1", "Hello", "you"), Row("2", "Good night, everyone", "you")], max_new_tokens=6)
    prompts = [row.prompt for row in task.rows("test")]
    said = [[row.prediction for row in evaluate_task(model, tokenizer, task).rows]]
    task.chat = False
    said.append([row.prediction for row in evaluate_task(model, tokenizer, task).rows])
    wanted = [generate(model, tokenizer, prompts, 6, form=PromptFormat(chat=chat)) for chat in (True, False)]
    assert said == wanted
    assert said[0] != said[1]
