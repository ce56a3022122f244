"""The table's numbers are those of scipy and of hand computation, and its tests hold what a bootstrap promises."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from secura_lightning.cli.main import main
from secura_lightning.errors import SecuraError
from secura_lightning.metrics.continual import summarise
from secura_lightning.metrics.text import score
from secura_lightning.study import stats
from secura_lightning.study.compare import group, significance
from secura_lightning.study.records import pack, pack_counts, record_of, unpack, unpack_counts
from secura_lightning.study.resample import OF_KINDS, OF_MATRIX, Bootstrap
from secura_lightning.study.table import render

N = 40
KINDS = ("capital", "opposite", "past")


def record(method: str, seed: int, skill: float, lr: float = 0.001, tasks: tuple[str, ...] = ("A", "B")) -> Any:
    """A run whose rows are right with probability ``skill`` once learned, and base rows with 1 - skill / 2."""
    rng = np.random.default_rng([seed, round(1000 * skill)])
    t = len(tasks)
    rows = {
        task: [(rng.random(N) < (skill if i < after else 0.1)).astype(float) for after in range(t + 1)]
        for i, task in enumerate(tasks)
    }
    kinds = {
        kind: [np.ones(N), *((rng.random(N) < 1 - skill / (2 + k)).astype(float) for _ in range(t))]
        for k, kind in enumerate(KINDS)
    }
    matrix = np.array([[rows[task][after].mean() for task in tasks] for after in range(t + 1)])
    base = np.array([[kinds[kind][after].mean() for kind in KINDS] for after in range(t + 1)])
    return {
        "cell": f"{method},lr={lr},seed={seed}",
        "stage": "main",
        "axes": {"method": method, "lr": lr, "seed": seed},
        "seconds": 10.0 * seed,
        "memory_mb": 500.0,
        "tasks": list(tasks),
        "matrix": matrix.tolist(),
        "base_knowledge": {
            "accuracy": base.mean(1).tolist(),
            "perplexity": [3.0] + [6.0] * t,
            "kinds": {kind: base[:, k].tolist() for k, kind in enumerate(KINDS)},
        },
        "metrics": summarise(matrix, base),
        "steps": list(range(t + 1)),
        "meta": {"seed": seed, "trainable_parameters": 1000},
        "rows": {
            "tasks": {task: {"ids": "x", "scores": [pack(list(row)) for row in rows[task]]} for task in tasks},
            "base": {"ids": "y", "kinds": {kind: [pack(list(row)) for row in kinds[kind]] for kind in KINDS}},
        },
    }


RUNS = [record(method, seed, skill) for method, skill in (("lora", 0.5), ("secura", 0.8)) for seed in (1, 2, 3)]


@pytest.fixture
def results(tmp_path: Path) -> Callable[..., Path]:
    def write(records: list[Any] = RUNS, folder: str = "study") -> Path:
        path = tmp_path / folder / "results.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        return path

    return write


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["compare", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# ------------------------------------------------------------------------------------------------------ the table


def test_means_and_intervals_are_those_of_scipy(
    results: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table(compare(capsys, results(), "--format", "csv"))
    assert [row["method"] for row in rows] == ["secura", "lora"]
    for row in rows:
        runs = [one for one in RUNS if one["axes"]["method"] == row["method"]]
        for metric in ("AP", "learning_accuracy", "forgetting", "base_retention"):
            values = np.array([one["metrics"][metric] for one in runs])
            low, high = scipy_stats.t.interval(0.95, 2, loc=values.mean(), scale=scipy_stats.sem(values))
            assert float(row[metric]) == pytest.approx(values.mean(), abs=1e-6)
            assert float(row[f"{metric} ±"]) == pytest.approx((high - low) / 2, rel=1e-5, abs=1e-9)
        assert float(row["perplexity_ratio"]) == 2.0
        assert float(row["seconds"]) == 20.0


def test_sorting_puts_the_best_first_whatever_best_means(
    results: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def order(metric: str) -> list[str]:
        return [row["method"] for row in table(compare(capsys, results(), "--sort", metric, "--format", "csv"))]

    best = {metric: max(RUNS[::3], key=lambda one: one["metrics"][metric])["axes"]["method"] for metric in ("AP",)}
    assert order("AP")[0] == best["AP"] == "secura"
    means = {
        m: np.mean([o["metrics"]["forgetting"] for o in RUNS if o["axes"]["method"] == m]) for m in ("lora", "secura")
    }
    assert order("forgetting")[0] == min(means, key=lambda m: means[m])
    assert order("base_retention")[0] == "lora"


def test_retention_is_told_for_sets_of_kinds(results: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("--kinds", "touched=capital,past", "--kinds", "untouched=opposite")
    rows = table(compare(capsys, results(), *kinds, "--format", "csv"))
    for row in rows:
        runs = [one["base_knowledge"]["kinds"] for one in RUNS if one["axes"]["method"] == row["method"]]
        assert float(row["retention/untouched"]) == pytest.approx(
            np.mean([run["opposite"][-1] for run in runs]), abs=1e-6
        )
        both = [(run["capital"][-1] + run["past"][-1]) / 2 for run in runs]
        assert float(row["retention/touched"]) == pytest.approx(np.mean(both), abs=1e-6)


def test_formats_and_files(results: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    markdown = compare(capsys, results(), "--format", "markdown", "--metrics", "AP,parameters")
    assert markdown.splitlines()[0].split() == ["|", "method", "|", "n", "|", "AP", "|", "parameters", "|"]
    assert "t-interval" in markdown
    latex = compare(capsys, results(), "--format", "latex", "--metrics", "AP,base_retention")
    assert latex.startswith("\\begin{tabular}{lrrr}\n\\hline\nmethod & n & AP & base\\_retention \\\\")
    assert "$\\pm$" in latex
    compare(capsys, results(), "--out", tmp_path / "deep" / "table.md")
    assert "secura" in (tmp_path / "deep" / "table.md").read_text()


def test_pictures_are_written(results: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    more = [*RUNS, *(record("lora", seed, 0.6, lr=0.01) for seed in (1, 2))]
    out = compare(capsys, results(more), "--plots", tmp_path / "figures", "--top", 2)
    for name in ("pareto", "curves", "matrices"):
        assert f"{name}.png" in out
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_told(
    results: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare = [{**one, "base_knowledge": None, "metrics": {**one["metrics"], "base_retention": None}} for one in RUNS]
    out = compare(capsys, results(bare), "--plots", tmp_path / "figures")
    assert "no pareto.png: no group has both base_retention and learning_accuracy" in out
    assert not (tmp_path / "figures" / "pareto.png").exists()


def test_numbers_may_be_written_in_any_way(results: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = results([*RUNS, *(record("lora", seed, 0.6, lr=0.01) for seed in (1, 2))])
    for text in ("1e-3", "0.001", "1.0e-3,1e-3"):
        rows = table(compare(capsys, path, "--where", f"lr={text}", "--format", "csv"))
        assert [(row["method"], row["n"]) for row in rows] == [("secura", "3"), ("lora", "3")]
    tested = table(compare(capsys, path, "--against", "method=lora,lr=1e-2", "--format", "csv"))
    assert [row["lr"] for row in tested if not row["Δ AP"]] == ["0.01"]


def test_markdown_cells_cannot_break_the_table() -> None:
    assert render(["a", "b"], [["x|y", "1"]], "markdown").splitlines()[-1] == "| x\\|y |   1 |"


# ------------------------------------------------------------------------------------------------------ the paths


def test_folders_without_a_sweep_are_grouped_by_their_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for version, (seed, lr) in enumerate([(1, 0.1), (2, 0.1), (1, 0.3), (2, 0.1)]):
        folder = tmp_path / "logs" / "mine" / f"version_{version}"
        folder.mkdir(parents=True)
        run = record("x", seed, 0.5 + 0.1 * version)
        content = {key: run[key] for key in ("tasks", "matrix", "base_knowledge", "metrics", "steps", "meta")}
        (folder / "continual.json").write_text(json.dumps(content))
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\nmodel: {{optimizer: {{lr: {lr}}}}}\n")
    rows = table(compare(capsys, tmp_path / "logs", "--format", "csv", "--metrics", "AP"))
    assert sorted((row["lr"], row["n"]) for row in rows) == [("0.1", "2"), ("0.3", "1")]  # a repeat counts once
    one = table(compare(capsys, tmp_path / "logs" / "mine" / "version_2", "--format", "csv", "--metrics", "AP"))
    assert one[0]["run"] == "mine"


def test_the_same_cell_of_two_sweeps_stays_two_groups(
    results: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = [record("lora", seed, 0.7) for seed in (1, 2, 3)]
    rows = table(compare(capsys, results(), results(other, "second"), results(), "--format", "csv"))
    assert sorted((row["source"], row["method"], row["n"]) for row in rows) == [
        ("second", "lora", "3"),
        ("study", "lora", "3"),
        ("study", "secura", "3"),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "no file or folder nowhere"),
        (["{empty}"], 1, "holds no complete run; name a run's folder"),
        (["{results}", "--sort", "APP"], 2, "metric 'APP' is unknown; choose among AP"),
        (["{results}", "--against", "dora"], 2, "--against dora: fits no group; name one of"),
        (["{single}", "--against", "lora", "--test", "perplexity"], 1, "'perplexity' is not computed from rows"),
        (["{results}", "--where", "method=dora"], 2, "--where leaves no run"),
        (["{results}", "--where", "nope=1"], 2, "--where nope: no such axis"),
        (["{results}", "--over", "nope"], 2, "--over nope: no such axis"),
        (["{results}", "--kinds", "a=nothing"], 2, "the probe has no kind 'nothing'"),
        (["{damaged}"], 1, "is damaged"),
        (["{results}", "--top", "0", "--plots", "{empty}"], 2, "--top is 0; it must be at least 1"),
        (["{results}", "--resamples", "0", "--against", "lora"], 2, "--resamples is 0; it must be at least 1"),
        (["{single}", "--seed", "-1", "--against", "lora"], 2, "--seed is -1; it must be at least 0"),
        (["{results}", "--plots", "{empty}", "--retention", "typo"], 2, "metric 'typo' is unknown; choose among AP"),
    ],
)
def test_bad_input_is_one_line(
    results: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.jsonl").write_text('{"cell": "a", "axes"')
    places = {
        "empty": tmp_path / "empty",
        "results": results(),
        "single": results(RUNS[::3], "single"),
        "damaged": tmp_path / "damaged.jsonl",
    }
    assert main(["compare", *(argument.format(**places) for argument in arguments)]) == code
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert message in told[0]


# -------------------------------------------------------------------------------------------------- the statistics


def test_several_seeds_are_compared_by_students_t(
    results: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = ("AP", "base_retention")
    options = ("--against", "lora", "--test", ",".join(metrics), "--format", "csv")
    header, found, _ = csv.reader(io.StringIO(compare(capsys, results(), *options)))
    assert found[0] == "secura"
    places = [i for i, name in enumerate(header) if name.startswith("Δ")]
    raw = []
    for place, metric in zip(places, metrics, strict=True):
        ours, theirs = ([o["metrics"][metric] for o in RUNS if o["axes"]["method"] == m] for m in ("secura", "lora"))
        wanted = scipy_stats.ttest_rel(ours, theirs)
        low, high = wanted.confidence_interval(0.95)
        assert [float(x) for x in found[place : place + 3]] == pytest.approx(
            [np.mean(ours) - np.mean(theirs), low, high], rel=1e-5
        )
        assert found[place + 4] == "seeds"
        raw.append(float(wanted.pvalue))
    assert [float(found[place + 3]) for place in places] == pytest.approx(stats.holm(raw), rel=1e-4)
    text = compare(capsys, results(), *options[:4])
    assert "Student's t" in text
    assert "bootstrap" not in text


def test_students_t_by_hand() -> None:
    # differences 1, 2, 3: mean 2, variance 1, error 1/sqrt(3), t = 2 sqrt(3); with 2 degrees of freedom the p-value is
    # 1 - t / sqrt(t^2 + 2) and the quantile of 0.975 is 0.95 sqrt(2 / (1 - 0.95^2))
    t, quantile = 2 * 3**0.5, 0.95 * (2 / (1 - 0.95**2)) ** 0.5
    found = stats.difference_over_seeds([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], paired=True)
    assert found == pytest.approx((2, 2 - quantile / 3**0.5, 2 + quantile / 3**0.5, 1 - t / (t * t + 2) ** 0.5))
    # Welch: variances 2 and 2 of two runs each, error sqrt(2), 2 degrees of freedom, t = 3 / sqrt(2)
    t = 3 / 2**0.5
    found = stats.difference_over_seeds([4.0, 6.0], [1.0, 3.0], paired=False)
    half = quantile * 2**0.5
    assert found == pytest.approx((3, 3 - half, 3 + half, 1 - t / (t * t + 2) ** 0.5))


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=6, unique=True),
    st.lists(st.floats(-1, 1), min_size=2, max_size=6, unique=True),
)
@example([0.0, 1e-130], [0.0, 1e-275])  # the squares of their variances are zero
def test_other_seeds_are_compared_by_welch_as_in_scipy(ours: list[float], theirs: list[float]) -> None:
    found = stats.difference_over_seeds(ours, theirs, paired=False)
    spread = np.var(ours) / len(ours) + np.var(theirs) / len(theirs)
    if found is None:
        assert spread < 1e-12
        return
    if spread < 1e-8:  # scipy loses its digits first
        return
    wanted = scipy_stats.ttest_ind(ours, theirs, equal_var=False)
    low, high = wanted.confidence_interval(0.95)
    np.testing.assert_allclose(found[1:], [low, high, wanted.pvalue], rtol=1e-6, atol=1e-9)


def test_single_runs_are_compared_over_rows(results: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--against", "lora", "--test", "AP", "--resamples", 400)
    text = compare(capsys, results(RUNS[::3]), *options)
    assert "paired bootstrap, 400 resamples" in text
    assert "does not cover the choice of seeds" in text
    assert "Student" not in text
    row = next(one for one in table(compare(capsys, results(RUNS[::3]), *options, "--format", "csv")) if one["Δ AP"])
    assert row["over"] == "rows"
    assert float(row["Δ AP"]) == pytest.approx(RUNS[3]["metrics"]["AP"] - RUNS[0]["metrics"]["AP"], abs=1e-6)
    assert float(row["p"]) == pytest.approx(2 / 401, rel=1e-4)  # nothing crosses zero
    mixed = table(compare(capsys, results(RUNS[:4]), *options, "--format", "csv"))  # three runs of lora, one of secura
    assert [one["over"] for one in mixed if one["Δ AP"]] == ["rows"]


def test_seeds_that_agree_in_everything_leave_the_rows(
    results: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    twins = [{**one, "cell": f"{i}", "meta": {**one["meta"], "seed": seed}, "axes": {**one["axes"], "seed": seed}}
             for i, one in enumerate((RUNS[0], RUNS[3])) for seed in (1, 2)]  # fmt: skip
    rows = table(compare(capsys, results(twins), "--against", "lora", "--format", "csv", "--resamples", 50))
    assert [(row["n"], row["over"]) for row in rows] == [("2", "rows"), ("2", "")]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 60), st.floats(0.05, 0.95))
def test_a_group_against_its_own_copy_differs_by_nothing(seed: int, n: int, share: float) -> None:
    rows = (np.random.default_rng(seed).random(n) < share).astype(float)
    metric = stats.row_weights(n, 200, np.random.default_rng(1)) @ rows
    assert stats.difference_over_rows(metric, metric.copy()) == (0.0, 0.0, 0.0, 1.0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 50))
def test_exchanging_the_groups_turns_the_interval_around(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    weights = stats.row_weights(n, 300, np.random.default_rng(1))
    ours, theirs = weights @ rng.random(n), weights @ rng.random(n)
    one, back = stats.difference_over_rows(ours, theirs), stats.difference_over_rows(theirs, ours)
    np.testing.assert_allclose([one[0], one[1], one[2], one[3]], [-back[0], -back[2], -back[1], back[3]], atol=1e-12)
    assert one[1] <= one[2]
    assert 2 / 301 <= one[3] <= 1


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_resampled_weights_are_shares_of_whole_rows(n: int, seed: int) -> None:
    weights = stats.row_weights(n, 50, np.random.default_rng(seed))
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights * n, np.round(weights * n), atol=1e-9)
    np.testing.assert_array_equal(weights[0], np.full(n, 1 / n))


def test_pairing_rows_narrows_the_interval_of_runs_that_err_on_the_same_rows() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.random(200) < 0.5).astype(float)
    better = np.maximum(rows, (rng.random(200) < 0.1).astype(float))
    together = stats.row_weights(200, 2000, np.random.default_rng(1))
    apart = stats.row_weights(200, 2000, np.random.default_rng(2))
    paired = stats.difference_over_rows(together @ better, together @ rows)
    loose = stats.difference_over_rows(together @ better, apart @ rows)
    assert paired[2] - paired[1] < 0.5 * (loose[2] - loose[1])
    # against the closed form: the standard deviation of the rows' differences
    width = 2 * 1.96 * (better - rows).std() / np.sqrt(200)
    assert paired[2] - paired[1] == pytest.approx(width, rel=0.15)


def test_the_test_over_rows_errs_about_as_often_as_it_says() -> None:
    """Groups that do not differ: about one p-value in twenty is below 0.05 when rows alone vary."""
    rng = np.random.default_rng(0)
    below = 0
    for trial in range(200):
        ours, theirs = (rng.random((2, 60)) < 0.6).astype(float)
        weights = stats.row_weights(60, 300, np.random.default_rng(trial))
        below += stats.difference_over_rows(weights @ ours, weights @ theirs)[3] < 0.05
    assert 2 <= below <= 22


def test_the_interval_over_three_seeds_covers_what_it_says() -> None:
    rng = np.random.default_rng(0)
    runs = [stats.difference_over_seeds(*rng.normal(size=(2, 3)).tolist(), paired) for paired in (True, False) * 500]
    covered = np.mean([found[1] <= 0 <= found[2] for found in runs if found])
    assert 0.93 <= covered <= 0.98  # Welch's is a little wide with so few


WORDS = ("yes", "no", "maybe")


@pytest.mark.parametrize("metric", ["macro_f1", "bleu", "chrf"])
def test_metrics_that_are_no_mean_of_rows_are_computed_anew_for_every_resample(tmp_path: Path, metric: str) -> None:
    rng = np.random.default_rng(0)
    references = [f"{WORDS[i]} it is {WORDS[j]}" for i, j in rng.integers(0, 3, (12, 2))]
    answers = [[f"{WORDS[i]} it is {WORDS[j]}" for i, j in rng.integers(0, 3, (12, 2))] for _ in range(2)]
    (tmp_path / "predictions").mkdir()
    matrix = []
    for after, texts in enumerate(answers):
        whole, rows = score(metric, texts, references)
        matrix.append([whole])
        lines = [json.dumps({"id": str(i), "reference": references[i], "prediction": texts[i], "score": rows[i]})
                 for i in range(12)]  # fmt: skip
        (tmp_path / "predictions" / f"row{after}_A.jsonl").write_text("\n".join(lines))
    report = {"tasks": ["A"], "matrix": matrix, "base_knowledge": None, "metrics": {"AP": matrix[1][0]},
              "steps": [0, 1], "meta": {"seed": 1}, "details": [{"A": {"metric": metric}}] * 2}  # fmt: skip
    (tmp_path / "continual.json").write_text(json.dumps(report))
    run = {**json.loads(json.dumps(record_of(tmp_path))), "cell": "one"}
    bootstrap = Bootstrap(20)
    found = bootstrap.metric(run, "AP")
    assert found[0] == pytest.approx(matrix[1][0], abs=1e-12)
    draws = np.rint(12 * bootstrap._weights["task A", 12]).astype(int)
    for value, times in zip(found, draws, strict=True):
        drawn = [i for i, count in enumerate(times) for _ in range(count)]
        wanted = score(metric, [answers[1][i] for i in drawn], [references[i] for i in drawn])[0]
        assert value == pytest.approx(wanted, abs=1e-12)
    del run["rows"]["tasks"]["A"]["counts"]  # as records of versions before did
    with pytest.raises(SecuraError, match=f"task A is scored by {metric}, which is no mean of its rows' scores"):
        bootstrap.metric(run, "AP")


def test_packed_counts_come_back() -> None:
    counts = np.random.default_rng(0).integers(0, 5000, (7, 3)).astype(float)
    np.testing.assert_array_equal(unpack_counts(pack_counts(counts)), counts)
    assert unpack_counts(pack_counts(None)) is None


def test_the_resampled_metric_starts_with_the_reported_one() -> None:
    bootstrap = Bootstrap(20, kinds={"k": ["past"]})
    for one in RUNS[:2]:
        for metric, reported in one["metrics"].items():
            assert bootstrap.metric(one, metric)[0] == pytest.approx(reported, abs=1e-12)
        assert bootstrap.metric(one, "task/B")[0] == pytest.approx(one["matrix"][-1][1])
        past = one["base_knowledge"]["kinds"]["past"][-1]
        assert bootstrap.metric(one, "retention/k")[0] == pytest.approx(past)
        assert bootstrap.metric(one, "base/past")[0] == pytest.approx(past)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4))
def test_metrics_of_many_matrices_are_those_of_each(seed: int, tasks: int, kinds: int) -> None:
    rng = np.random.default_rng(seed)
    matrices, tables = rng.random((3, tasks + 1, tasks)), rng.integers(0, 3, (3, tasks + 1, kinds)) / 2
    for i in range(3):
        wanted = summarise(matrices[i], tables[i])
        for metric, compute in {**OF_MATRIX, **OF_KINDS}.items():
            value = compute(tables if metric in OF_KINDS else matrices)[i]
            assert value == pytest.approx(wanted[metric]) if wanted[metric] is not None else np.isnan(value)


def test_runs_on_other_rows_do_not_pair() -> None:
    other = record("dora", 1, 0.5)
    other["rows"]["tasks"]["A"]["ids"] = "z"
    groups = group([*RUNS[:3], other])
    with pytest.raises(Exception, match="its rows of task A are not those of the other runs"):
        significance(groups, groups[0], ["AP"], Bootstrap(10))


def test_holm_is_that_of_the_paper() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.6]) == [1.0, 1.0]
    assert stats.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_only_raises_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = stats.holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [q for _, q in pairs] == sorted(adjusted)


@given(st.floats(0.51, 0.9999), st.integers(1, 200))
def test_t_quantile_is_that_of_scipy(p: float, df: int) -> None:
    assert stats.t_quantile(p, df) == pytest.approx(scipy_stats.t.ppf(p, df), rel=1e-9)


@given(st.floats(0.01, 1e3), st.floats(1, 1e3))
def test_t_p_value_is_that_of_scipy(t: float, df: float) -> None:
    assert stats.t_p_value(t, df) == stats.t_p_value(-t, df) == pytest.approx(2 * scipy_stats.t.sf(t, df), rel=1e-9)
    assert stats.t_p_value(t, 1) == pytest.approx(1 - 2 / np.pi * np.arctan(t), rel=1e-8)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_pareto_front_holds_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = set(stats.pareto(points))
    assert front
    for i, (x, y) in enumerate(points):
        beaten = any((u > x and v >= y) or (u >= x and v > y) for u, v in points)
        assert (i in front) != beaten


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_packed_scores_come_back(scores: list[float]) -> None:
    text = pack(scores)
    assert text is not None
    back = unpack(text)
    np.testing.assert_allclose(back, scores, atol=0 if set(scores) <= {0.0, 1.0} else 0.5 / 4095 + 1e-12)
