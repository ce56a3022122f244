"""How a prompt and its answer become one text: joined by a separator, or through the tokenizer's chat template.

    plain  [bos] prompt separator answer [eos]
    chat   head  prompt tail separator answer end      head, tail, end: what the template writes around the messages

What a template writes is found by rendering two marked messages, so that training, generation and the scoring of
choices read the same tokens: the conversation up to the assistant's turn, the template's generation prompt included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from secura_lightning.errors import ConfigError

Chat = bool | Literal["auto"]
Messages = Callable[[str], list[dict[str, str]]]

_USER = "MARK1OF1THE1USER"  # texts that no template holds or changes
_ASSISTANT = "MARK2OF2THE2ASSISTANT"


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the prompts and answers of one tokenizer.

    Attributes:
        head: Text before every prompt.
        tail: Text after it; the last that is not trained.
        separator: Text between that and the answer, which may share a token with the answer.
        end: Text after the answer, up to and including the template's end-of-turn token; trained.
        first_ids: Token ids before everything.
        last_ids: Token ids after everything; trained.
        strips: Whether the template takes the white space around a prompt away.
        is_chat: Whether all this is a chat template's.
    """

    head: str = ""
    tail: str = ""
    separator: str = " "
    end: str = ""
    first_ids: tuple[int, ...] = ()
    last_ids: tuple[int, ...] = ()
    strips: bool = False
    is_chat: bool = False

    def text(self, prompt: str) -> str:
        """Everything before the answer's separator."""
        return f"{self.head}{prompt.strip() if self.strips else prompt}{self.tail}"


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How rows are rendered, whatever the tokenizer.

    Attributes:
        separator: Text between prompt and answer where no chat template is used.
        chat: Whether prompts go through the tokenizer's chat template; ``auto``: where it has one.
        system: What the template's system message says; None for the template's own. A template without such a role
            gets it at the start of the user's message.
    """

    separator: str = " "
    chat: Chat = "auto"
    system: str | None = None

    def uses_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether this tokenizer's prompts go through a chat template."""
        return bool(tokenizer.chat_template) if self.chat == "auto" else bool(self.chat)

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """What stands around this tokenizer's prompts and answers.

        Raises:
            ConfigError: The tokenizer has no chat template and ``chat`` is true, or the template cannot be rendered.
        """
        if not self.uses_chat(tokenizer):
            return Frame(separator=self.separator, first_ids=_id(tokenizer.bos_token_id), last_ids=_eos(tokenizer))
        if not tokenizer.chat_template:
            raise ConfigError("data.chat is true, but the tokenizer has no chat template; set it to auto or false")
        return _chat_frame(tokenizer, self.system)


def as_format(form: PromptFormat | str) -> PromptFormat:
    """``form``, where a text alone means a separator."""
    return PromptFormat(form) if isinstance(form, str) else form


def _chat_frame(tokenizer: PreTrainedTokenizerBase, system: str | None) -> Frame:
    before = _opening(tokenizer, system)
    asked = _render(tokenizer, before(_USER), generation=True)
    spaced = _render(tokenizer, before(f" {_USER} "), generation=True)
    whole = _render(tokenizer, [*before(_USER), {"role": "assistant", "content": _ASSISTANT}], generation=False)
    if asked.count(_USER) != 1 or whole.count(_ASSISTANT) != 1:
        raise ConfigError("data.chat: the chat template does not show each message once; set data.chat: false")
    head, tail = asked.split(_USER)
    lead, after = whole.split(_ASSISTANT)
    # What follows the generation prompt before an answer: a space ([/INST] answer), an empty thought, or, where the
    # template knows no generation prompt, the assistant's header. All but spaces belong to the prompt.
    lead = lead.removeprefix(asked) if lead.startswith(asked) else ""
    kept = lead.rstrip(" ")
    end = _end(tokenizer, after)
    return Frame(
        head=head,
        tail=tail + kept,
        separator=lead[len(kept) :],
        end=end,
        last_ids=() if end else _eos(tokenizer),
        strips=f" {_USER} " not in spaced,
        is_chat=True,
    )


def _opening(tokenizer: PreTrainedTokenizerBase, system: str | None) -> Messages:
    """The messages up to the user's, in the first form that the template takes and shows."""
    forms = (
        [_messages(), _messages("")]  # some templates cannot do without a first message from the system
        if system is None
        else [_messages(system), _messages(folded=f"{system}\n\n")]
    )
    for form in forms:
        if _fails(tokenizer, form(_USER)) is None and (system or "").strip() in _render(tokenizer, form(_USER), True):
            return form
    raise ConfigError(
        f"data.chat: the tokenizer's chat template fails ({_fails(tokenizer, forms[0](_USER))}); set data.chat: false"
    )


def _messages(system: str | None = None, folded: str = "") -> Messages:
    """From a prompt to messages; ``folded`` begins the user's."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return lambda prompt: [*first, {"role": "user", "content": folded + prompt}]


def _fails(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str | None:
    """Why the template refuses the messages; None where it takes them."""
    try:
        _render(tokenizer, messages, True)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], generation: bool) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation))


def _end(tokenizer: PreTrainedTokenizerBase, after: str) -> str:
    """The part of ``after`` to the end of its first special token; empty where it has none."""
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    places = [(after.find(token), -len(token)) for token in known if token and token in after]
    if not places:
        return ""
    place, length = min(places)
    return after[: place - length]


def _eos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return _id(tokenizer.eos_token_id)


def _id(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)
