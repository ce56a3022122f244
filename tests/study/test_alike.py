"""Runs that differ stay apart, whatever they differ in and wherever they lie, and the same run counts once."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from secura_lightning.cli.main import main
from secura_lightning.study.load import load
from secura_lightning.study.records import record_of
from secura_lightning.study.table import shortened
from tests.cli.test_compare import RUNS, record

KEPT = ("tasks", "matrix", "base_knowledge", "metrics", "steps", "meta")


def run(folder: Path, config: dict[str, Any], seed: int = 1, skill: float = 0.5) -> Path:
    """A run as `secura fit` leaves it."""
    folder.mkdir(parents=True)
    one = record("x", seed, skill)
    (folder / "continual.json").write_text(json.dumps({key: one[key] for key in KEPT}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed, **config}))
    return folder


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")
    return path


def rows(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, str]]:
    assert main(["compare", *map(str, arguments), "--format", "csv", "--metrics", "AP"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def callbacks(*classes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    listed = [{"class_path": f"secura_lightning.strategies.{name}", "init_args": init} for name, init in classes]
    return {"trainer": {"callbacks": listed}}


# ---------------------------------------------------------------------------------------------------- the settings


def test_runs_that_differ_in_their_callbacks_stay_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ewc = {"ewc_lambda": 100.0, "online": True}
    buffer = ("ReplayBuffer", {"capacity": 200})
    for version, config in enumerate([
        callbacks(("EWC", ewc)),
        callbacks(("EWC", {**ewc, "ewc_lambda": 300.0})),
        callbacks(buffer, ("ER", {"replay_ratio": 0.25})),
        {"trainer": {"callbacks": None}},
    ]):  # fmt: skip
        run(tmp_path / "mine" / f"version_{version}", config, skill=0.5 + 0.1 * version)
    found = rows(capsys, tmp_path / "mine")
    assert sorted(row["callbacks"] for row in found) == [
        "EWC ewc_lambda 100",
        "EWC ewc_lambda 300",
        "ReplayBuffer + ER",
        "null",
    ]
    kept = rows(capsys, tmp_path / "mine", "--where", "callbacks=EWC ewc_lambda 300")
    assert [row["n"] for row in kept] == ["1"]


def test_runs_that_differ_in_their_tasks_stay_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tasks(*paths: str, name: str = "secura_lightning.data.tasks.table.TextTask") -> dict[str, Any]:
        shared = {"name": None, "template": "{sentence}, a template that is longer than forty letters"}
        return {"data": {"tasks": [{"class_path": name, "init_args": {**shared, "path": path}} for path in paths]}}

    configs = [tasks("a", "b"), tasks("a", "c"), tasks("b", "a"), tasks("a", "b", name="elsewhere.TextTask")]
    for version, config in enumerate(configs):
        run(tmp_path / "mine" / f"version_{version}", config, skill=0.4 + 0.1 * version)
    assert len({row["tasks"] for row in rows(capsys, tmp_path / "mine")}) == 4
    found = rows(capsys, *(tmp_path / "mine" / f"version_{version}" for version in range(3)))
    assert {row["tasks"] for row in found} == {f"TextTask path {a} + TextTask path {b}" for a, b in ("ab", "ac", "ba")}


def test_long_settings_are_cut_where_they_are_printed_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = "x" * 60
    for version, text in enumerate((f"{start}a", f"{start}b")):
        run(tmp_path / "mine" / f"version_{version}", {"model": {"prompt": text}}, skill=0.5 + 0.1 * version)
    assert {one["axes"]["prompt"] for one in load([tmp_path / "mine"])} == {f"{start}a", f"{start}b"}
    assert {row["prompt"] for row in rows(capsys, tmp_path / "mine")} == {"…a…", "…b…"}


def test_numbers_that_print_alike_stay_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for version, lr in enumerate((0.12345678, 0.12345679)):
        run(tmp_path / "mine" / f"version_{version}", {"lr": lr}, skill=0.5 + 0.1 * version)
    assert len(rows(capsys, tmp_path / "mine")) == 2


@pytest.mark.parametrize(
    "texts", [["short", "x" * 50], ["x" * 50 + "a", "x" * 50 + "b", "y" * 50], ["x" * n for n in (41, 42, 43)]]
)
def test_shortened_texts_stay_distinct(texts: list[str]) -> None:
    assert len(set(shortened(texts).values())) == len(texts)


# ----------------------------------------------------------------------------------------------------- the sources


def test_sweeps_of_one_name_in_two_places_stay_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = [record("lora", seed, 0.7) for seed in (1, 2, 3)]
    old, new = write(tmp_path / "A/pocket/results.jsonl", RUNS), write(tmp_path / "B/pocket/results.jsonl", other)
    found = rows(capsys, old.parent, new.parent)
    assert sorted((row["source"], row["method"], row["n"]) for row in found) == [
        ("A/pocket", "lora", "3"),
        ("A/pocket", "secura", "3"),
        ("B/pocket", "lora", "3"),
    ]


def test_files_of_results_in_one_folder_stay_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "res/old.jsonl", RUNS[:3])
    new = write(tmp_path / "res/new.jsonl", [record("lora", seed, 0.7) for seed in (1, 2)])
    assert {(row["source"], row["n"]) for row in rows(capsys, old, new)} == {("old.jsonl", "3"), ("new.jsonl", "2")}


def test_other_seeds_of_another_sweep_are_pooled_only_where_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path / "first/results.jsonl", RUNS[:2])
    second = write(tmp_path / "second/results.jsonl", [record("lora", seed, 0.9) for seed in (4, 5)])
    assert {(row["source"], row["n"]) for row in rows(capsys, first, second)} == {("first", "2"), ("second", "2")}
    assert [row["n"] for row in rows(capsys, first, second, "--over", "source")] == ["4"]


def test_files_that_hold_different_groups_are_one_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, secura = write(tmp_path / "lora.jsonl", RUNS[:3]), write(tmp_path / "secura.jsonl", RUNS[3:])
    found = rows(capsys, lora, secura)
    assert [(row["method"], row["n"]) for row in found] == [("secura", "3"), ("lora", "3")]
    assert "source" not in found[0]


def test_a_copy_of_a_file_adds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write(tmp_path / "pocket/results.jsonl", RUNS)
    copy, part = write(tmp_path / "copy.jsonl", RUNS), write(tmp_path / "part.jsonl", RUNS[:2])
    for paths in ((whole, copy), (part, whole), (whole, whole.parent, part)):
        found = rows(capsys, *paths)
        assert [(row["method"], row["n"]) for row in found] == [("secura", "3"), ("lora", "3")]
        assert "source" not in found[0]


def test_runs_of_one_name_in_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path / "A/mine/version_0", {"lr": 0.1}, skill=0.5)
    again = run(tmp_path / "B/mine/version_0", {"lr": 0.1}, skill=0.6)
    seed = run(tmp_path / "C/mine/version_0", {"lr": 0.1}, seed=2)
    assert {(row["source"], row["n"]) for row in rows(capsys, first, again)} == {("A/mine", "1"), ("B/mine", "1")}
    pooled = rows(capsys, first, seed)  # the same settings, another seed
    assert [row["n"] for row in pooled] == ["2"]
    assert "source" not in pooled[0]


# ------------------------------------------------------------------------------------------------- the ends of lines


@pytest.mark.parametrize("letter", ["\u2028", "\u0085", "\x1e"])
def test_a_prediction_may_hold_any_letter(tmp_path: Path, letter: str) -> None:
    folder = run(tmp_path / "mine" / "version_0", {})
    (folder / "predictions").mkdir()
    lines = [json.dumps({"id": f"{i}{letter}", "score": 1.0, "prediction": letter}, ensure_ascii=False) for i in "ab"]
    (folder / "predictions" / "row0_A.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    found = record_of(folder)
    assert found["rows"]["tasks"]["A"]["scores"][0] == "11"
    named = [{**RUNS[0], "cell": f"a{letter}b", "tasks": [f"A{letter}", "B"]}]
    assert load([write(tmp_path / "results.jsonl", named)])[0]["tasks"][0] == f"A{letter}"
