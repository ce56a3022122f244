"""``secura eval``: the tasks and the probe of any configuration on any checkpoint, merged folder or model.

    secura eval --config C.yaml [--ckpt F | --model DIR] [any key of fit] [--out DIR]

Without --ckpt and --model it is the configuration's base model that is scored. Scores come as `fit` computes them: a
run's last checkpoint gives the last line of its table, on the held-out part of the probe where the configuration has a
guard that watches the other. --out (evaluations/CONFIGURATION/MODEL by default) gets eval.json and every
single prediction. --lm-eval TASKS scores tasks of lm-eval (`pip install 'secura_lightning[eval]'`), with or without
--config.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.callbacks import report
from secura_lightning.callbacks.forgetting import ForgettingMonitor
from secura_lightning.cli.checkpoints import rebuild
from secura_lightning.cli.fit import FitCLI, check_trainer, parse, quiet, run_name
from secura_lightning.cli.options import OneLineOptions, add_checkpoint, place
from secura_lightning.data.probe import Probe
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.evaluation.evaluate import ProbeScore, TaskScore, evaluate_probe, evaluate_task
from secura_lightning.evaluation.harness import require_lm_eval, run_lm_eval
from secura_lightning.metrics.text import check_metric
from secura_lightning.modeling.load import BaseSpec, load_model, load_tokenizer, stored_in
from secura_lightning.modeling.precision import autocast, full_name
from secura_lightning.strategies.guard import RetentionGuard
from secura_lightning.strategies.watch import split_probe

EPILOG = """examples:
  secura eval --config configs/quickstart.yaml --ckpt RUN/checkpoints/task2-logic.ckpt
  secura eval --config configs/quickstart.yaml --model merged --forgetting.limit 200
  secura eval --config configs/quickstart.yaml                            # the base model
  secura eval --model merged --lm-eval arc_easy,hellaswag --limit 100
"""


class EvalCLI(FitCLI):
    """The parser of ``fit``, without its trainer."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """No trainer: its devices may be elsewhere. Its keys are checked as ``fit`` does."""
        check_trainer(self.config_init["trainer"])


def _parser() -> argparse.ArgumentParser:
    parser = OneLineOptions(prog="secura eval", description=__doc__, epilog=EPILOG)
    parser.add_argument("--config", action="append", default=[], help="configuration of fit; the last one on top")
    add_checkpoint(parser, required=False)
    parser.add_argument("--model", help="merged folder, local model or hub id to score instead of a checkpoint")
    parser.add_argument("--out", type=Path, help="folder of the results (evaluations/CONFIGURATION/MODEL)")
    parser.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-eval, separated by commas")
    parser.add_argument("--lm-eval-include", type=Path, metavar="DIR", help="folder with task files of your own")
    parser.add_argument("--limit", type=int, help="rows of each lm-eval task (others: --forgetting.limit)")
    return parser


def main(args: list[str]) -> int:
    """Score one model.

    Raises:
        ConfigError: The command line or the configuration is wrong.
        SecuraError: The model, the checkpoint or the data is wrong.
    """
    quiet()
    options, rest = _parser().parse_known_args(args)
    _check(options, rest)
    files = [argument for file in options.config for argument in ("--config", file)]
    cli = parse(EvalCLI, [*files, *rest]) if files else None
    spec, model, tokenizer = _load(options, cli)
    # Of two configurations the tasks differ: each has a folder of its own.
    out = options.out or Path("evaluations", *([run_name(cli.config)] if cli else []), _name(options, spec))
    content: dict[str, Any] = {
        "model": {"base": spec.identity(), "ckpt": options.ckpt and str(options.ckpt), "weights": options.weights},
        **report.environment(),
    }
    if cli is not None:
        content |= _score(cli, model, tokenizer, out)
    if options.lm_eval is not None:
        content["lm_eval"] = run_lm_eval(model, tokenizer, options.lm_eval, options.lm_eval_include, options.limit)
        print(f"\n{lm_eval_table(content['lm_eval'])}")
    report.write_atomically(out / "eval.json", json.dumps(_finite(content), indent=1) + "\n")
    print(f"\nwrote {out / 'eval.json'}")
    return 0


def _check(options: argparse.Namespace, rest: list[str]) -> None:
    if options.ckpt is not None and options.model is not None:
        raise ConfigError("--ckpt and --model are both given; keep one")
    if options.weights is not None and options.ckpt is None:
        raise ConfigError(f"--weights {options.weights}: only a checkpoint of an I-LoRA run holds two: give --ckpt")
    if not options.config:
        if options.lm_eval is None:
            raise ConfigError("--config: give the configuration whose tasks are scored (or --lm-eval TASKS)")
        if rest:
            raise ConfigError(f"no option {rest[0]} without --config (`secura eval --help` lists the options)")
        if options.ckpt is None and options.model is None:
            raise ConfigError("--model: say which model to score (or --ckpt, or --config)")
    if options.lm_eval is None and (options.lm_eval_include is not None or options.limit is not None):
        raise ConfigError("--lm-eval-include and --limit go with --lm-eval TASKS (others: --forgetting.limit)")
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit is {options.limit}; it must be at least 1")
    if options.out is not None:
        _check_folder(options.out)
    if options.lm_eval is not None:
        require_lm_eval()  # before a model is loaded


def _check_folder(out: Path) -> None:
    """Refuse a folder that cannot be made or written into, before anything is scored."""
    place = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not place.is_dir():
        raise SecuraError(f"--out: {place} is a file; give a folder")
    if not os.access(place, os.W_OK):
        raise SecuraError(f"--out: {place} cannot be written into; give another folder")


def _name(options: argparse.Namespace, spec: BaseSpec) -> str:
    if options.ckpt is None:
        return Path(spec.base).name
    run = options.ckpt.resolve().parent.parent  # RUN/version_0/checkpoints/last.ckpt
    return f"{run.parent.name}-{run.name}-{options.ckpt.stem}" if options.ckpt.is_file() else options.ckpt.name


def _load(options: argparse.Namespace, cli: Any) -> tuple[BaseSpec, PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on its device, and its tokenizer."""
    if options.ckpt is not None:
        spec, model, _ = rebuild(options.ckpt, options.weights)
    else:
        spec = BaseSpec() if cli is None else stored_in(cli.model.spec, full_name(cli.config["trainer"]["precision"]))
        if options.model is not None:
            spec = replace(spec, base=options.model, revision=None, init="pretrained")
        if spec.init == "random":
            torch.manual_seed(cli.model.seed)
        model = load_model(spec)
    return spec, place(model, spec).eval(), load_tokenizer(spec)


def _score(cli: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> dict[str, Any]:
    """Score the configuration's tasks and probe, print the table and write the predictions."""
    data: SequenceDataModule = cli.datamodule
    monitor: ForgettingMonitor = cli.config_init["forgetting"]
    for task in data.tasks:
        if not task.is_text:
            check_metric(task.metric)
    asked = None if data.probe is None else _held_out(data.probe, cli.config_init["trainer"].get("callbacks"))
    scores: list[TaskScore] = []
    probe: ProbeScore | None = None
    with ExitStack() as stack:
        stack.enter_context(autocast(cli.config["trainer"]["precision"], next(model.parameters()).device.type))
        bar = stack.enter_context(tqdm(leave=False, disable=None, unit=" rows"))
        shared: dict[str, Any] = {
            "batch_size": monitor.batch_size,
            "normalise": monitor.normalise,
            "progress": bar.update,
        }
        for task in data.tasks:
            bar.set_description(f"Evaluating {task.name}")
            scores.append(evaluate_task(model, tokenizer, task, monitor.split, monitor.limit, **shared))
            report.save_predictions(scores[-1].rows, report.predictions_path(out, 0, task.name))
        if asked is not None:
            bar.set_description(f"Evaluating {asked.name}")
            probe = evaluate_probe(model, tokenizer, asked, monitor.limit, **shared)
            report.save_predictions(probe.rows, report.predictions_path(out, 0, None))
    print(f"\n{score_table(scores, probe)}")
    return {
        "split": monitor.split,
        "limit": monitor.limit,
        "tasks": {score.task: score.summary() for score in scores},
        "base_knowledge": None if asked is None or probe is None else {**report.base_of(probe), "part": asked.part},
    }


def _held_out(probe: Probe, callbacks: Any) -> Probe:
    """What a fit of the configuration scores: the part of the probe that no guard of it watches."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    guard = next((one for one in listed if isinstance(one, RetentionGuard) and one.watch is None), None)
    return probe if guard is None else split_probe(probe, guard.share)[1]


def score_table(scores: list[TaskScore], probe: ProbeScore | None) -> str:
    """A line per task, then the probe's kinds, accuracy and perplexity."""
    lines = [["", "score", "95 % from", "to", "chance", "majority", "n", "metric"]]
    for score in scores:
        low, high = score.interval or (None, None)
        cells = [_number(value) for value in (score.value, low, high, score.chance, score.majority)]
        lines.append([score.task, *cells, str(score.n), score.metric])
    if probe is not None:
        for kind, value in probe.kinds.items():
            lines.append([f"base/{kind}", _number(value), "-", "-", "-", "-", "", "accuracy"])
        if probe.kinds:
            ends = ["-", "-", _number(probe.chance), "-", str(probe.n), "accuracy"]
            lines.append(["base", _number(probe.accuracy), *ends])
        if probe.perplexity is not None:
            lines.append(
                ["base text", _number(probe.perplexity, 2), "-", "-", "-", "-", str(probe.tokens), "perplexity"]
            )
    return aligned(lines)


def lm_eval_table(results: dict[str, dict[str, Any]]) -> str:
    """A line per task and metric."""
    lines = [["lm-eval", "score", "stderr", "metric"]]
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filters = key.partition(",")
            if isinstance(value, int | float) and filters and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filters}")
                shown = f"{error:.4f}" if isinstance(error, int | float) else "-"
                lines.append([task, f"{value:.4f}", shown, metric])
    return aligned(lines)


def _finite(value: Any) -> Any:
    """NaN and infinity as None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def aligned(lines: list[list[str]]) -> str:
    """Cells in columns: the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *middle, last in lines:
        right = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *right, last]).rstrip())
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join(text)
