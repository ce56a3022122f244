"""``secura inspect``: what a configuration trains on, before anything is trained.

    secura inspect --config C.yaml [any key of fit] [--only TASK] [--examples N]

It reads the data and the tokenizer, and no model weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedTokenizerBase

from secura_lightning.cli.fit import FitCLI, check_trainer, parse, quiet
from secura_lightning.data.encode import encode_answers
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.data.statistics import Histogram, RowCounts, count_rows, histogram, trained_span
from secura_lightning.data.store import EncodedRows
from secura_lightning.data.task import Task
from secura_lightning.errors import ConfigError
from secura_lightning.modeling.load import BaseSpec, resolve

_BAR = 40  # characters of the longest bar
_SHOWN = 1200  # characters of an example, after which its middle is left out
_MANY_CLASSES = 20


class InspectCLI(FitCLI):
    """The parser of ``fit``, without its trainer."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add what is shown."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--only", type=str | None, default=None, help="Show this task alone.")
        parser.add_argument("--examples", type=int, default=2, help="Rendered training rows of each task.")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """No trainer: its devices may be elsewhere. Its keys are checked as ``fit`` does."""
        check_trainer(self.config_init["trainer"])


def main(args: list[str]) -> int:
    """Print what the configuration trains on.

    Raises:
        ConfigError: The configuration is wrong.
        SecuraError: The data or the tokenizer is wrong.
    """
    quiet()
    cli = parse(InspectCLI, args)
    data, trainer, only = cli.datamodule, cli.config["trainer"], cli.config["only"]
    if cli.config["examples"] < 0:
        raise ConfigError(f"--examples is {cli.config['examples']}; it must be at least 0")
    names = [task.name for task in data.tasks]
    if only is not None and only not in names:
        near = get_close_matches(only, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the tasks are {', '.join(names)}"
        raise ConfigError(f"--only: no task '{only}'; {hint}")
    tokenizer = cli.model.tokenizer
    ranks = world_size(trainer["accelerator"], trainer["devices"], trainer["num_nodes"])
    data.lay_out(tokenizer, trainer["accumulate_grad_batches"], ranks)
    for place, task in enumerate(data.tasks):
        if only in (None, task.name):
            for line in describe_task(data, place, tokenizer, cli.config["examples"], colour=_colour()):
                print(line)
    for line in describe_plan(data, ranks, _context(cli.model.spec)):
        print(line)
    return 0


def describe_task(
    data: SequenceDataModule, place: int, tokenizer: PreTrainedTokenizerBase, examples: int, colour: bool = False
) -> Iterator[str]:
    """The lines that show one task of a sequence that is laid out."""
    task, rows = data.tasks[place], data.encoded[place]
    test = task.rows("test")
    counts = count_rows(data.training_rows(task), test)
    yield _title(f"task {place + 1}/{len(data.tasks)}: {task.name}", colour)
    validation = "" if data.streaming else f", {len(task.rows('validation'))} validation"
    kind = "text, scored by perplexity" if task.is_text else f"scored by {task.metric}"
    yield f"rows        {counts.rows} training{validation}, {counts.test} test; {kind}"
    if not task.is_text:
        yield _format(tokenizer, task)
    yield from _overlap(counts, task.is_text)
    yield from _classes(counts)
    yield from _lengths(rows, data, place, task)
    if not task.is_text:
        yield from _answers(tokenizer, task)
    shown = min(examples, len(rows))
    for i in np.linspace(0, len(rows) - 1, shown).astype(int).tolist():
        yield f"example     row {i + 1}, {len(rows[i].ids)} tokens, {rows[i].n_trained} trained"
        before, trained = trained_span(tokenizer, rows[i])
        yield from (f"  | {line}" for line in _marked(before, trained, colour).split("\n"))
    yield ""


def _format(tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    frame = task.prompt_format.frame(tokenizer)
    if not frame.is_chat:
        unused = (
            " (the tokenizer has a chat template, which data.chat leaves unused)" if tokenizer.chat_template else ""
        )
        return f"format      prompt{frame.separator!r}answer{unused}"
    parts = (frame.head, "PROMPT", frame.tail, frame.separator, "ANSWER", frame.end or tokenizer.eos_token or "")
    return f"format      chat template: {''.join(parts)!r}"


def _overlap(counts: RowCounts, is_text: bool) -> Iterator[str]:
    what = "documents are training documents" if is_text else "rows are training rows, answer included"
    shared = f"{counts.shared_rows} of {counts.test} test {what}"
    if counts.shared_loosely or counts.shared_prompts:
        shared += (
            f"; {counts.shared_prompts} share a prompt, {counts.shared_loosely} where case and white space do not count"
        )
    yield f"overlap     {shared}"
    if counts.repeated:
        yield f"repeated    {counts.repeated} of {counts.rows} training rows occur before in the same words"


def _classes(counts: RowCounts) -> Iterator[str]:
    if not counts.classes:
        return
    width = max(map(len, counts.classes))
    most = max(counts.classes.values())
    for i, (name, n) in enumerate(list(counts.classes.items())[:_MANY_CLASSES]):
        head = "classes" if i == 0 else ""
        yield f"{head:<12}{name:<{width}} {n:>7} {n / counts.rows:>6.1%} {_bar(n, most)}"
    if len(counts.classes) > _MANY_CLASSES:
        yield f"{'':<12}and {len(counts.classes) - _MANY_CLASSES} more"


def _lengths(rows: EncodedRows, data: SequenceDataModule, place: int, task: Task) -> Iterator[str]:
    lengths = rows.lengths
    middle, high = np.percentile(lengths, [50, 95])
    what = "blocks" if task.is_text else "rows"
    yield (
        f"lengths     {len(rows)} {what} of {lengths.min()} to {lengths.max()} tokens, median {middle:.0f}, 95 % up to "
        f"{high:.0f}; data.max_length is {data.max_length}"
    )
    yield from _bars(histogram(lengths))
    if not task.is_text:
        cut = rows.truncated[rows.truncated > 0]
        lost = f", {int(cut.sum())} tokens in all" if len(cut) else ""
        yield f"truncated   {len(cut)} of {len(rows)} prompts{lost}; answers are never cut"
    yield f"padding     {data.batches().padding_efficiency(place):.1%} of a batch's positions hold tokens{_how(data)}"


def _how(data: SequenceDataModule) -> str:
    if data.packing:
        return " (packed)"
    return " (grouped by length)" if data.group_by_length else ""


def _bars(found: Histogram) -> Iterator[str]:
    width = len(str(found.edges[-1]))
    for low, beyond, n in zip(found.edges, found.edges[1:], found.counts, strict=False):
        yield f"{'':<12}{low:>{width}} to {beyond - 1:>{width}} {n:>7} {_bar(n, max(found.counts))}".rstrip()


def _answers(tokenizer: PreTrainedTokenizerBase, task: Task) -> Iterator[str]:
    free = [(row.prompt, row.answer) for row in task.rows("test") if not row.choices]
    if free:
        lengths = [len(ids) for ids in encode_answers(tokenizer, free, task.prompt_format)]
        long = sum(n > task.max_new_tokens for n in lengths)
        yield (
            f"answers     of test rows take up to {max(lengths)} tokens, median {np.median(lengths):.0f}; "
            f"init_args.max_new_tokens={task.max_new_tokens} is too few for {long} of {len(lengths)}"
        )


def describe_plan(data: SequenceDataModule, ranks: int = 1, context: int | None = None) -> Iterator[str]:
    """The lines that show what will be done in which order."""
    accumulate = data.plan.accumulate
    window = data.batch_size * accumulate * ranks
    yield (
        f"plan: {sum(data.plan.steps)} optimizer steps of {window} rows = data.batch_size {data.batch_size} x "
        f"{accumulate} accumulated x {ranks} device{'s' * (ranks > 1)}; {len(data.plan)} batches a device"
    )
    width = max(4, *(len(task.name) for task in data.tasks))
    yield f"  {'task':<{width}} {'rows':>9} {'steps':>7} {'passes':>7} {'tokens':>13} {'trained':>13} {'batches':>8}"
    for task, rows, steps in zip(data.tasks, data.encoded, data.plan.steps, strict=True):
        passes = steps * window / len(rows)
        tokens, trained = (passes * float(count.sum()) for count in (rows.lengths, rows.trained))
        yield (
            f"  {task.name:<{width}} {len(rows):>9} {steps:>7} {passes:>7.2f} {tokens:>13,.0f} {trained:>13,.0f} "
            f"{steps * accumulate:>8}"
        )
    if context is not None and data.max_length > context:
        yield f"  data.max_length={data.max_length} is above the model's context of {context} tokens"


def world_size(accelerator: str, devices: Any, nodes: int) -> int:
    """Processes that the trainer's keys ask for; ``auto`` counts the CUDA devices of this machine."""
    if isinstance(devices, str) and devices.strip("-").isdecimal():
        devices = int(devices)
    if isinstance(devices, int) and devices >= 0:
        return devices * nodes
    if isinstance(devices, list):
        return len(devices) * nodes
    if devices not in ("auto", -1):
        return len(str(devices).split(",")) * nodes
    import torch

    return (max(1, torch.cuda.device_count()) if accelerator in ("auto", "gpu", "cuda") else 1) * nodes


def _context(spec: BaseSpec) -> int | None:
    try:
        config = AutoConfig.from_pretrained(
            resolve(spec.base), revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError):
        return None  # the tokenizer could be read, which is all that is needed here
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _marked(before: str, trained: str, colour: bool) -> str:
    if len(before) > _SHOWN:
        half = _SHOWN // 2
        before = f"{before[:half]} ... {len(before) - 2 * half} characters ... {before[-half:]}"
    if not colour:
        return f"{before}[[{trained}]]"
    # Line by line: a terminal's pager forgets the colour at the end of a line.
    return before + "\n".join(f"\033[30;42m{line}\033[0m" for line in trained.split("\n"))


def _title(text: str, colour: bool) -> str:
    return f"\033[1m{text}\033[0m" if colour else f"== {text}"


def _bar(n: int, most: int) -> str:
    return "#" * max(round(_BAR * n / most), int(n > 0))


def _colour(stream: Any = None) -> bool:
    return bool((stream or sys.stdout).isatty()) and not os.environ.get("NO_COLOR")


__all__: Sequence[str] = ["describe_plan", "describe_task", "main", "world_size"]
