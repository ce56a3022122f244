"""``secura chat``: talk to the base and the tuned model side by side.

Both answer token by token, in two columns where there is a terminal. Prompts are rendered as the run's were (its
data.chat and data.system), so that a first prompt gives what its evaluation would. Through a chat template each model
keeps its own conversation; without one every prompt is continued on its own. /reset forgets the conversation, /quit (or
Ctrl-D) ends.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from typing import Any, TextIO, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.adapters import AdapterSet
from secura_lightning.cli.checkpoints import prompt_format_of, rebuild
from secura_lightning.cli.options import OneLineOptions, add_checkpoint, place
from secura_lightning.data.encode import render_prompts
from secura_lightning.data.prompt import PromptFormat
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation.batching import context_length, evaluating
from secura_lightning.evaluation.generate import end_ids
from secura_lightning.modeling.load import load_tokenizer

EPILOG = """examples:
  secura chat --ckpt RUN/checkpoints/last.ckpt
  secura chat --ckpt RUN/checkpoints/last.ckpt --prompt "The capital of France is" --max-new-tokens 16
"""
_FIRST, _LAST = "MARK1OF2THE2FIRST", "MARK2OF2THE2LAST"  # texts that no template holds or changes
_GAP = 3  # columns between the two answers
_NARROWEST = 50  # terminals below this get one answer under the other


def _parser() -> argparse.ArgumentParser:
    parser = OneLineOptions(prog="secura chat", description=__doc__, epilog=EPILOG)
    add_checkpoint(parser)
    parser.add_argument("--prompt", help="answer this once and end")
    parser.add_argument("--chat", choices=("auto", "true", "false"),
                        help="whether prompts go through the tokenizer's chat template, as data.chat (default: as in "
                        "the run; of an adapter folder, where there is a template)")  # fmt: skip
    parser.add_argument("--system", help="system message of that template (default: the run's)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer in tokens (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the most probable token (0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws, where the temperature is above 0 (0)")
    return parser


def main(args: list[str]) -> int:
    """Talk.

    Raises:
        ConfigError: The command line is wrong.
        SecuraError: The checkpoint is damaged, or its base has changed.
    """
    options = _parser().parse_args(args)
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {options.max_new_tokens}; it must be at least 1")
    if options.temperature < 0:
        raise ConfigError(f"--temperature is {options.temperature}; it must be at least 0")
    if options.prompt is not None and not options.prompt.strip():
        raise ConfigError("--prompt is empty; give some text")
    spec, model, adapters = rebuild(options.ckpt, options.weights)
    place(model, spec)
    draws = options.max_new_tokens, options.temperature, options.seed
    pair = Pair(model, adapters, load_tokenizer(spec), *draws, form=_form(options))
    if options.prompt is not None:
        show(pair.answer(options.prompt), sys.stdout)
        return 0
    print("base on the left, tuned on the right; /reset forgets, /quit ends")
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return 0
        if prompt == "/quit":
            return 0
        if prompt == "/reset":
            pair.reset()
        elif prompt:
            show(pair.answer(prompt), sys.stdout)


def _form(options: argparse.Namespace) -> PromptFormat:
    """How prompts are rendered: as in the run, unless the command line says otherwise."""
    form = prompt_format_of(options.ckpt)
    if options.chat is not None:
        form = replace(form, chat={"true": True, "false": False}.get(options.chat, "auto"))
    if options.system is not None:
        if form.chat is False:
            raise ConfigError("--system goes into the chat template, which is not used here; add --chat true")
        return replace(form, system=options.system)
    return form if form.chat else replace(form, system=None)


class Pair:
    """The base and the tuned model, which share their weights: an adapter switched off is the base.

    Args:
        model: The model.
        adapters: Its adapters.
        tokenizer: Its tokenizer.
        max_new_tokens: Longest answer.
        temperature: Divides the logits; 0 for the most probable token.
        seed: Seed of the draws; both models get the same ones.
        form: How prompts are rendered.

    Raises:
        ConfigError: ``form`` needs a chat template that the tokenizer lacks, or that cannot be rendered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: AdapterSet,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        form: PromptFormat = PromptFormat(),  # noqa: B008  # frozen
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self.form = form
        self.ends = end_ids(model, tokenizer, form.frame(tokenizer))
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.histories: tuple[list[dict[str, str]], ...] = ([], [])

    def answer(self, prompt: str) -> Iterator[tuple[str, str]]:
        """Yield both answers as they grow, token by token in step; the conversation keeps them."""
        texts = ["", ""]
        streams = [self._stream(self._ids(history, prompt), tuned) for history, tuned in self._sides()]
        for grown in zip_longest(*streams):
            texts = [text if new is None else new for text, new in zip(texts, grown, strict=True)]
            yield texts[0], texts[1]
        for (history, _), text in zip(self._sides(), texts, strict=True):
            history += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]

    def _sides(self) -> list[tuple[list[dict[str, str]], bool]]:
        return list(zip(self.histories, (False, True), strict=True))

    def _ids(self, history: list[dict[str, str]], prompt: str) -> list[int]:
        room = context_length(self.model, reserve=self.max_new_tokens)
        if history and self.form.uses_chat(self.tokenizer):
            prompt = self._joined(history, prompt)
        return render_prompts(self.tokenizer, [prompt], self.form)[0].cut(room)

    def _joined(self, history: list[dict[str, str]], prompt: str) -> str:
        """The conversation from the first prompt to the last, to be framed as a single prompt is."""
        first, *between = history
        marked = [{**first, "content": _FIRST}, *between, {"role": "user", "content": _LAST}]
        text = str(self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True))
        middle = text.split(_FIRST)[-1].split(_LAST)[0]
        return f"{first['content']}{middle}{prompt}"

    def _stream(self, ids: list[int], tuned: bool) -> Iterator[str]:
        """Yield the answer to ``ids`` so far, after every token."""
        call = cast(Any, self.model)
        generator = torch.Generator().manual_seed(self.seed)
        answer: list[int] = []
        cache = None
        for _ in range(self.max_new_tokens):
            # Opened for one step alone, because the other side takes its step in between.
            with ExitStack() as stack:
                device = stack.enter_context(evaluating(self.model))
                if not tuned:
                    stack.enter_context(self.adapters.disabled())
                read = torch.tensor([ids if cache is None else answer[-1:]], device=device)
                output = call(read, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            token = self._draw(output.logits[0, -1].float().cpu(), generator)
            if token in self.ends:
                break
            answer.append(token)
            yield cast(str, self.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def _draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        return int((logits / self.temperature).softmax(-1).multinomial(1, generator=generator))


def show(answers: Iterator[tuple[str, str]], out: TextIO) -> None:
    """Print two growing answers: side by side and redrawn on a terminal, one under the other elsewhere."""
    width, height = shutil.get_terminal_size()
    if not out.isatty() or width < _NARROWEST:
        base, tuned = [("", ""), *answers][-1]
        print(f"base:  {base}\ntuned: {tuned}", file=out, flush=True)
        return
    lines: list[str] = []
    drawn = 0
    for final in answers:
        lines = columns(*final, width)
        drawn = _redraw(lines[1 - height :], drawn, out)  # what does not fit the screen could not be redrawn
    _redraw(lines or ["(both end at once)"], drawn, out)


def _redraw(lines: list[str], drawn: int, out: TextIO) -> int:
    """Put ``lines`` in the place of the ``drawn`` last lines; the number of lines that are there now."""
    up = f"\x1b[{drawn}F" if drawn else ""  # to the start of the first of them
    out.write(f"{up}\x1b[J" + "\n".join(lines) + "\n")
    out.flush()
    return len(lines)


def columns(left: str, right: str, width: int) -> list[str]:
    """Two texts in two columns of a terminal that is ``width`` wide."""
    each = (width - _GAP) // 2
    parts = [[wrapped for line in text.splitlines() or [""] for wrapped in textwrap.wrap(line, each) or [""]]
             for text in (left, right)]  # fmt: skip
    return [f"{a:<{each}} | {b}".rstrip() for a, b in zip_longest(*parts, fillvalue="")]
