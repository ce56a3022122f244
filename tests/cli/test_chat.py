"""Base and tuned side by side: each says what it would say alone."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from secura_lightning.cli.chat import Pair, columns, show
from secura_lightning.cli.checkpoints import prompt_format_of
from secura_lightning.cli.main import main
from secura_lightning.data.prompt import PromptFormat
from secura_lightning.evaluation.generate import generate
from tests.cli.checkpoints import EVERY, adapted, base_folder, checkpoint
from tests.evaluation.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


def test_each_side_says_what_it_would_say_alone(base: Path) -> None:
    model, adapters = adapted(base, EVERY["SECURA-element"], size=0.2)
    tokenizer = byte_tokenizer()
    answers = list(Pair(model, adapters, tokenizer, max_new_tokens=8).answer("hello"))
    tuned = generate(model, tokenizer, ["hello"], 8)[0]
    with adapters.disabled():
        plain = generate(model, tokenizer, ["hello"], 8)[0]
    assert answers[-1] == (plain, tuned)
    assert plain != tuned
    assert 1 < len(answers) <= 8  # it streams


def test_a_seed_draws_the_same_again(base: Path) -> None:
    model, adapters = adapted(base, EVERY["LoRA-none"])
    drawn = [list(Pair(model, adapters, byte_tokenizer(), 8, 1.0, seed).answer("hello"))[-1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_with_a_template_each_side_keeps_its_own_conversation(base: Path) -> None:
    model, adapters = adapted(base, EVERY["LoRA-none"], size=0.2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}a:"
    pair = Pair(model, adapters, tokenizer, max_new_tokens=4)
    first = list(pair.answer("one"))[-1]
    assert [history[1]["content"] for history in pair.histories] == list(first)
    ids = pair._ids(pair.histories[1], "two")
    assert tokenizer.decode(ids).endswith("u:two\na:")
    pair.reset()
    assert pair.histories == ([], [])


CHATML = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] | trim }}[e]{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.mark.parametrize(
    "form", [PromptFormat(), PromptFormat(system="Be brief."), PromptFormat(chat=False)], ids=("auto", "system", "off")
)
def test_a_first_prompt_is_read_as_the_runs_evaluation_reads_it(base: Path, form: PromptFormat) -> None:
    model, adapters = adapted(base, EVERY["LoRA-none"], size=0.2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    pair = Pair(model, adapters, tokenizer, max_new_tokens=8, form=form)
    assert tokenizer.decode(pair._ids([], "hello")).endswith("hello" if form.chat is False else "[a]")
    assert ("Be brief." in tokenizer.decode(pair._ids([], "hello"))) == (form.system is not None)
    said = list(pair.answer("hello"))[-1]
    assert said[1] == generate(model, tokenizer, ["hello"], 8, form=form)[0]
    second = tokenizer.decode(
        pair._ids([{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}], "two")
    )
    if form.chat is False:
        assert "one" not in second
        return
    system = "[s]Be brief.[e]" if form.system else ""
    assert second.endswith(f"{system}[u]one[e][a]1[e][u]two[e][a]")


def test_the_runs_own_setting_is_followed(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint(path, base, EVERY["LoRA-none"])
    assert prompt_format_of(path) == PromptFormat()
    content = torch.load(path, weights_only=True)
    for data, form in (
        ({"chat": False, "system": None}, PromptFormat(chat=False)),
        ({"chat": True, "system": "Be brief."}, PromptFormat(chat=True, system="Be brief.")),
        ({"tasks": ["a"]}, PromptFormat(chat=False)),
    ):
        torch.save({**content, "SequenceDataModule": data}, path)
        assert prompt_format_of(path) == form
    arguments = ["chat", "--ckpt", str(path), "--prompt", "hello", "--max-new-tokens", "2"]
    assert main(arguments) == 0
    assert main([*arguments, "--chat", "true"]) == 2  # this tokenizer has no template
    assert "the tokenizer has no chat template" in capsys.readouterr().err
    assert main([*arguments, "--system", "Be brief."]) == 2
    assert "--system goes into the chat template" in capsys.readouterr().err


def test_columns_fit_the_terminal() -> None:
    lines = columns("a short one", "word " * 30, 60)
    assert max(map(len, lines)) <= 60
    assert lines[0].startswith("a short one")
    assert " ".join(line.split(" | ")[1] for line in lines).split() == ["word"] * 30


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    out = Terminal()
    show(iter([("a", "x"), ("a b", "x y"), ("a b c\nnew", "x y")]), out)
    frames = out.getvalue().split("\x1b[J")[1:]
    assert frames[0].startswith("a ")
    assert frames[-2].startswith("a b c")
    assert out.getvalue().count("\x1b[1F") == 2  # one line goes, one comes; the last frame replaces two
    assert out.getvalue().count("\x1b[2F") == 1


def test_prompt_answers_once(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-none"], size=0.2)
    arguments = ["chat", "--ckpt", str(tmp_path / "last.ckpt"), "--max-new-tokens", "6"]
    assert main([*arguments, "--prompt", "hello"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("base:  ")
    assert any(line.startswith("tuned: ") for line in told)


def test_conversation_ends_at_quit(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "last.ckpt", base, EVERY["LoRA-none"])
    lines = iter(["hello", "", "/reset", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "--ckpt", str(tmp_path / "last.ckpt"), "--max-new-tokens", "2"]) == 0
    assert list(lines) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "required: --ckpt"),
        (["--ckpt", "absent.ckpt"], 1, "--ckpt: no file absent.ckpt"),
        (["--ckpt", "absent.ckpt", "--max-new-tokens", "0"], 2, "--max-new-tokens is 0"),
        (["--ckpt", "absent.ckpt", "--temperature", "-1"], 2, "--temperature is -1.0"),
        (["--ckpt", "absent.ckpt", "--prompt", " "], 2, "--prompt is empty"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["chat", *arguments]) == code
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert message in told[0]
