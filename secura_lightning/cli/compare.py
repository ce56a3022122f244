"""``secura compare``: one table over runs, means over seeds with intervals, tests against a reference, pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from secura_lightning.errors import ConfigError
from secura_lightning.study import compare
from secura_lightning.study.axes import means
from secura_lightning.study.compare import Difference, Group
from secura_lightning.study.load import load
from secura_lightning.study.records import Record
from secura_lightning.study.resample import Bootstrap, Kinds
from secura_lightning.study.settings import write_text
from secura_lightning.study.table import FORMATS, number, render

METRICS = ("learning_accuracy", "AP", "BWT", "forgetting", "base_retention", "perplexity_ratio", "parameters",
           "seconds", "memory_mb")  # fmt: skip


def main(args: list[str]) -> int:
    """Compare runs.

    Raises:
        ConfigError: The command line is wrong.
        SecuraError: A path holds no run.
    """
    options = _parser().parse_args(args)
    for key, least in (("resamples", 1), ("seed", 0), ("top", 1)):
        if getattr(options, key) < least:
            raise ConfigError(f"--{key} is {getattr(options, key)}; it must be at least {least}")
    kinds = {name: members.split(",") for name, members in _pairs(options.kinds, "--kinds").items()}
    records = _where(load(options.runs, options.stage), _pairs(options.where, "--where"))
    retained = [f"retention/{name}" for name in kinds]
    wanted = options.metrics.split(",") if options.metrics else [*METRICS, *retained]
    groups = compare.group(records, options.over)
    compare.check_metrics(records, [options.sort, *(wanted if options.metrics else retained)], kinds)
    if options.plots:
        compare.check_metrics(records, [options.retention], kinds)
    groups = compare.ordered(groups, options.sort, kinds)
    metrics = [name for name in wanted if any(compare.summarise(one, name, kinds) for one in groups)]
    tested = (options.test or options.sort).split(",")
    tests: dict[tuple[str, str], Difference] = {}
    reference = None
    if options.against:
        compare.check_metrics(records, tested, kinds)
        reference = compare.find(groups, options.against)
        bootstrap = Bootstrap(options.resamples, options.seed, kinds)
        with tqdm(total=len(groups) * len(tested), desc="Resampling", leave=False, disable=None) as bar:
            tests = compare.significance(groups, reference, tested, bootstrap, bar.update)
    header, rows = _table(groups, metrics, kinds, tests, tested if reference else [], options.format == "csv")
    text = render(header, rows, options.format, left=len(groups[0].axes))
    notes = _notes(reference, tests, options.resamples)
    if options.format in ("text", "markdown"):
        text = "\n".join([text, "", *notes])
    if options.out:
        write_text(options.out, text + "\n")
        print(f"wrote {options.out}")
    else:
        print(text)
    if options.plots:
        from secura_lightning.study.plots import draw  # matplotlib takes a second

        written = draw(groups, options.plots, options.retention, kinds, options.top)
        for path in written:
            print(f"wrote {path}")
        if not any(path.name == "pareto.png" for path in written):
            print(f"no pareto.png: no group has both {options.retention} and learning_accuracy")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="secura compare", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, sweep folders, or results.jsonl files")
    add("--sort", default="AP", metavar="METRIC", help="the best group first (AP)")
    add("--metrics", metavar="A,B,...", help="columns of the table, instead of the usual ones")
    add("--where", action="append", default=[], metavar="AXIS=VALUE[,VALUE]", help="keep only these runs")
    add("--over", action="append", default=[], metavar="AXIS", help="average over this axis too, besides the seed")
    add("--stage", choices=("main", "select"), default="main", help="runs of a sweep, or its search runs")
    add("--kinds", action="append", default=[], metavar="NAME=KIND[,KIND]",
        help="adds the metric retention/NAME over some kinds of base knowledge")  # fmt: skip
    add("--against", metavar="GROUP",
        help="test every group's difference from this one: by Student's t over seeds, of single runs by a paired "
        "bootstrap over evaluation rows")  # fmt: skip
    add("--test", metavar="A,B,...", help="metrics to test (the one of --sort)")
    add("--resamples", type=int, default=10000, help="of the bootstrap (10000)")
    add("--seed", type=int, default=0, help="of the bootstrap (0)")
    add("--format", choices=FORMATS, default="text")
    add("--out", type=Path, help="write the table here instead of printing it")
    add("--plots", type=Path, metavar="DIR", help="write pareto.png, curves.png and matrices.png here")
    add("--retention", default="base_retention", metavar="METRIC", help="horizontal axis of pareto.png")
    add("--top", type=int, default=8, help="groups in curves.png and matrices.png (8)")
    return parser


def _pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ConfigError(f"{option} {text}: write NAME=VALUE or NAME=VALUE,VALUE")
        pairs[name] = values
    return pairs


def _where(records: list[Record], where: dict[str, str]) -> list[Record]:
    """The records with the wanted values of axes.

    Raises:
        ConfigError: An axis is unknown, or nothing is left.
    """
    for name, values in where.items():
        if not any(name in record["axes"] for record in records):
            raise ConfigError(f"--where {name}: no such axis; the runs have {', '.join(records[0]['axes'])}")
        wanted = values.split(",")
        records = [r for r in records if name in r["axes"] and any(means(one, r["axes"][name]) for one in wanted)]
    if not records:
        raise ConfigError("--where leaves no run")
    return records


def _table(
    groups: Sequence[Group],
    metrics: Sequence[str],
    kinds: Kinds,
    tests: dict[tuple[str, str], Difference],
    tested: Sequence[str],
    plain: bool,
) -> tuple[list[str], list[list[str]]]:
    """Header and rows; ``plain`` gives every number a column of its own."""
    header = [*groups[0].axes, "n"]
    for name in metrics:
        header += [name, f"{name} ±"] if plain else [name]
    for name in tested:
        header += [f"Δ {name}", "low", "high", "p", "over"] if plain else [f"Δ {name} [95 %]", "p", "over"]
    rows = []
    for one in groups:
        row = [*one.axes.values(), str(len(one.records))]
        for name in metrics:
            found = compare.summarise(one, name, kinds)
            exact = ["" if x is None else f"{x:.6g}" for x in found or (None, None)]
            row += exact if plain else [compare.cell_text(found)]
        for name in tested:
            row += _test_text(tests.get((one.label, name)), plain)
        rows.append(row)
    return header, rows


def _test_text(found: Difference | None, plain: bool) -> list[str]:
    if found is None:  # the reference itself
        return [""] * 5 if plain else ["reference", "", ""]
    if plain:
        return [*(f"{x:.6g}" for x in (found.difference, found.low, found.high, found.p)), found.basis]
    digits = [f"{x:+.3f}" for x in (found.difference, found.low, found.high)]
    interval = f"{digits[0]} [{digits[1]}, {digits[2]}]"
    return [interval, number(found.p, 4) + ("*" if found.p < 0.05 else ""), found.basis]


def _notes(reference: Group | None, tests: dict[tuple[str, str], Difference], resamples: int) -> list[str]:
    """How the numbers were made."""
    notes = ["Mean over n runs, ± half of its 95 % t-interval (none for a single run)."]
    if reference is None:
        return notes
    notes.append(f"Δ: difference from {reference.label}, with its 95 % interval over seeds or rows.")
    bases = {found.basis for found in tests.values()}
    if "seeds" in bases:
        notes.append(
            "Over seeds: Student's t, of the differences of equal seeds where both groups have the same, else Welch's. "
            "It holds for these evaluation rows."
        )
    if "rows" in bases:
        notes.append(
            f"Over rows: paired bootstrap, {resamples} resamples of the evaluation rows, where a group has one run or "
            "no seed differs from another. It does not cover the choice of seeds."
        )
    told = f"p: two-sided, adjusted by Holm's method for the {len(tests)} tests of this table; * below 0.05."
    if "rows" in bases:
        told += f" The least of a first test over rows is {2 * len(tests) / (resamples + 1):.2g}."
    return [*notes, told]
