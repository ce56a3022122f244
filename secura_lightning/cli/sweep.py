"""``secura sweep``: many runs from one file; finished ones are skipped, interrupted ones go on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from secura_lightning.errors import ConfigError
from secura_lightning.study.grid import read_sweep
from secura_lightning.study.sweep import Runner

EPILOG = """example of a sweep file:

  base: quickstart.yaml                 # or a list of files, the last on top; relative to this file
  set: {forgetting.limit: 50}           # keys of every cell
  axes:
    method:                             # named variants set any keys
      lora:   {model.adapter: {class_path: LoRAConfig, init_args: {rank: 8}}}
      secura: {axes: {lr: [2.5e-3, 1e-2]}}        # its own learning rates
    lr: [1e-3, 3e-3, 1e-2]              # short for model.optimizer.lr
    seed: [1, 2, 3]                     # short for seed_everything; any dotted key works as an axis
  select: {axis: lr, metric: learning_accuracy, tasks: first, rows: validation}
  exclude: [{method: secura, seed: 3}]
  include: [{method: lora, lr: 3e-2, seed: 1}]

Runs lie under save_dir (lightning_logs/NAME), one folder a cell, with results.jsonl beside them.
"""


def main(args: list[str]) -> int:
    """Run a sweep.

    Raises:
        ConfigError: The sweep file or the command line is wrong.
        SecuraError: Another sweep is at work in the same folder.
    """
    parser = argparse.ArgumentParser(
        prog="secura sweep", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", type=Path, required=True, help="sweep file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (1)")
    parser.add_argument("--save_dir", type=Path, help="folder of the runs, instead of the file's")
    parser.add_argument("--stage", choices=("select", "all"), default="all", help="stop after the search, or run all")
    parser.add_argument("--only", action="append", default=[], metavar="AXIS=VALUE[,VALUE]",
                        help="run only cells with these values; may be repeated")  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="list the cells and how far each is")
    options = parser.parse_args(args)
    for key in ("jobs", "threads"):
        if getattr(options, key) < 1:
            raise ConfigError(f"--{key} is {getattr(options, key)}; it must be at least 1")
    sweep = read_sweep(options.config, options.save_dir)
    if options.stage == "select" and sweep.select is None:
        raise ConfigError(f"--stage select: {options.config} has no select")
    runner = Runner(sweep, options.jobs, options.threads, _only(options.only))
    if options.dry_run:
        print(runner.plan())
        return 0
    try:
        failed = runner.run(options.stage)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(runner.summary(failed))
    print(f"\nresults: {sweep.save_dir / 'results.jsonl'}")
    return 1 if failed or runner.undecided else 0


def _only(texts: list[str]) -> dict[str, list[str]]:
    only: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ConfigError(f"--only {text}: write AXIS=VALUE or AXIS=VALUE,VALUE")
        only.setdefault(name, []).extend(values.split(","))
    return only
