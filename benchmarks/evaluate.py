"""Evaluation in batches against one row at a time, on the same rows and with the same results.

    python -m benchmarks.evaluate                                   SECURA on the pocket model, its tasks and its probe
    python -m benchmarks.evaluate --config C.yaml --limit 32        those of another configuration
    python -m benchmarks.evaluate --base                            the same without the adapter

What a run scores at every task's end is the model with its adapters, so that is what is timed: untrained, which costs
the same. The loop runs them as they are; our evaluation keeps the adapted weights for its duration.

One row at a time is the loop that people write: a prompt is encoded and run alone; of a multiple-choice row every
(prompt, choice) pair is encoded and run as a sequence of its own; a document is scored alone. Generation uses the KV
cache on both sides. The answers of both sides are compared before anything is timed.

On one CPU thread a batch saves passes and repeated reading, but no arithmetic: of the base alone, what is bound by
reading prompts cannot gain ten times there (docs/data.md).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks._common import Row as Line
from benchmarks._common import clock, compare_paired, finish, paired, parser, tabulate
from benchmarks.adapters import ours
from secura_lightning.adapters.describe import summarize_adapter
from secura_lightning.cli.fit import parse
from secura_lightning.cli.inspect import InspectCLI
from secura_lightning.data.encode import encode_answers, encode_texts, render_prompts
from secura_lightning.data.rows import Row
from secura_lightning.evaluation.choices import pick_choices
from secura_lightning.evaluation.generate import generate
from secura_lightning.evaluation.perplexity import token_loss
from secura_lightning.modeling.load import load_model

TARGET = 0.1  # of the time of one row at a time


@torch.no_grad()
def generate_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], new: int
) -> list[str]:
    """Greedy answers, one prompt after another."""
    decoder: Any = model
    answers = []
    for row in rows:
        ids = torch.tensor([render_prompts(tokenizer, [row.prompt])[0].ids], device=model.device)
        output = decoder.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=True,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )  # fmt: skip
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


@torch.no_grad()
def pick_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], separator: str
) -> list[str]:
    """Choices by likelihood, one (prompt, choice) pair after another."""
    picked = []
    for row in rows:
        values = []
        for choice in row.choices:
            prompt = render_prompts(tokenizer, [row.prompt])[0].ids
            answer = encode_answers(tokenizer, [(row.prompt, choice)], separator)[0]
            ids = torch.tensor([prompt + answer], device=model.device)
            scores = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            values.append(scores.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item())
        picked.append(row.choices[values.index(max(values))])
    return picked


@torch.no_grad()
def loss_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> tuple[float, int]:
    """Negative log-likelihood of documents, one window after another."""
    total, count = 0.0, 0
    for text in texts:
        ids = encode_texts(tokenizer, [text])[0]
        for start in range(0, max(1, len(ids) - 1), length - 1):
            part = torch.tensor([ids[start : start + length]], device=model.device)
            total += float(model(input_ids=part, labels=part, use_cache=False).loss) * (part.shape[1] - 1)
            count += part.shape[1] - 1
    return total, count


def main(args: Sequence[str] | None = None) -> None:
    """Measure every task of the configuration, and the probe's text."""
    options = parser(__doc__ or "")
    options.add_argument("--config", default="configs/quickstart.yaml", help="base model, tasks and probe")
    options.add_argument("--base", action="store_true", help="without the configuration's adapter")
    options.add_argument("--limit", type=int, default=128, help="rows of each task")
    options.add_argument("--batch_size", type=int, default=64, help="sequences computed together")
    options.add_argument("--repeats", type=int, default=5, help="rounds")
    options.add_argument("--device", default="cpu")
    given = options.parse_args(args)
    torch.set_num_threads(1)  # both sides alike; several threads help the larger matrices of batches more
    limit, repeats = (8, 1) if given.quick else (given.limit, given.repeats)
    cli = parse(InspectCLI, ["--config", given.config])
    model, tokenizer = load_model(cli.model.spec).to(given.device).eval(), cli.model.tokenizer
    if not given.base:
        ours(cli.model.adapter)(model).eval()
    lines = []
    for task in cli.datamodule.tasks:
        rows = random.Random(0).sample(task.rows("test"), min(limit, len(task.rows("test"))))
        if task.is_text:
            continue
        pair: dict[str, Callable[[], Any]]
        if rows[0].choices:
            pair = {
                "batched": partial(pick_choices, model, tokenizer, rows, task.separator, False, given.batch_size),
                "one at a time": partial(pick_alone, model, tokenizer, rows, task.separator),
            }
            what = f"{task.name}: {len(rows)} rows of {len(rows[0].choices)} choices"
        else:
            prompts, new = [row.prompt for row in rows], task.max_new_tokens
            pair = {
                "batched": partial(generate, model, tokenizer, prompts, new, given.batch_size),
                "one at a time": partial(generate_alone, model, tokenizer, rows, new),
            }
            what = f"{task.name}: {len(rows)} answers generated"
        same = sum(a == b for a, b in zip(*(f() for f in pair.values()), strict=True))
        lines.append(measure(f"{what}, {same} the same", pair, repeats, given.device))
    texts = cli.datamodule.probe.texts()[:limit] if cli.datamodule.probe else []
    if texts:
        length = min(model.config.max_position_embeddings, 1024)
        pair = {
            "batched": partial(token_loss, model, tokenizer, texts, given.batch_size, length),
            "one at a time": partial(loss_alone, model, tokenizer, texts, length),
        }
        (one, n), (other, m) = (f() for f in pair.values())
        assert n == m, "both sides must score the same tokens"
        assert math.isclose(one, other, rel_tol=1e-3), f"losses differ: {one} and {other}"
        lines.append(measure(f"perplexity of {len(texts)} texts, {n} tokens", pair, repeats, given.device))
    what = cli.model.spec.base if given.base else f"{cli.model.spec.base} with {summarize_adapter(cli.model.adapter)}"
    finish(lines, given.json, f"Evaluation of {what}: batches of {given.batch_size} against one by one")


def measure(what: str, pair: dict[str, Callable[[], Any]], repeats: int, device: str) -> Line:
    """One line of the table, in seconds."""
    found = paired(pair, repeats, warmup=0, measure=clock(device))
    print(what)
    tabulate(found, "seconds")
    return compare_paired(f"{what}, s", found, "batched", "one at a time", TARGET)


if __name__ == "__main__":
    main()
