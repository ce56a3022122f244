"""A sweep runs what its file says, skips what is done, goes on where it was stopped, and tells what failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from secura_lightning.cli.main import main
from secura_lightning.errors import ConfigError
from secura_lightning.study.grid import Sweep, read_sweep
from secura_lightning.study.pool import Pool
from secura_lightning.study.settings import overlay, read_yaml, signature

FAKE = Path(__file__).parent / "fake_fit.py"
BASE = {
    "seed_everything": 1,
    "model": {"adapter": {"class_path": "LoRAConfig", "init_args": {"rank": 4}}, "optimizer": {"lr": 0.001}},
    "data": {"tasks": ["A", "B"], "steps_per_task": [5, 6], "probe": "P"},
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a base and a sweep file; cells run the stand-in for `secura fit`."""
    monkeypatch.setattr(Pool, "command", (sys.executable, str(FAKE)))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def go(**content: Any) -> Path:
        path = tmp_path / "grid.yaml"
        path.write_text(
            yaml.safe_dump({"base": "base.yaml", "save_dir": str(tmp_path / "runs"), **content}, sort_keys=False)
        )
        return path

    return go


def sweep(path: Path, *options: str) -> int:
    return main(["sweep", "-c", str(path), *options])


def results(path: Path) -> dict[str, dict[str, Any]]:
    lines = (path.parent / "runs" / "results.jsonl").read_text().splitlines()
    return {record["cell"]: record for record in map(json.loads, lines)}


def names(sweep: Sweep) -> list[str]:
    return [cell.name for cell in sweep.cells()]


# ------------------------------------------------------------------------------------------------------ the grid


def test_axes_multiply_and_variants_set_several_keys(write: Callable[..., Path]) -> None:
    path = write(
        axes={
            "method": {"lora": None, "dora": {"model.adapter": {"class_path": "DoRAConfig"}, "data.steps_per_task": 9}},
            "lr": [1e-3, 0.01],
            "seed": [1, 2],
        },
        exclude=[{"method": "dora", "seed": 2}],
        include=[{"method": "dora", "lr": 0.5, "seed": 7}],
    )
    grid = read_sweep(path)
    lora = [f"lora,lr={lr},seed={seed}" for lr in ("0.001", "0.01") for seed in (1, 2)]
    assert names(grid) == [*lora, "dora,lr=0.001,seed=1", "dora,lr=0.01,seed=1", "dora,lr=0.5,seed=7"]
    last = grid.cells()[-1].settings
    assert last["model"]["adapter"] == {"class_path": "DoRAConfig"}  # LoRA's settings went with its class
    assert last["model"]["optimizer"]["lr"] == 0.5
    assert (last["seed_everything"], last["data"]["steps_per_task"]) == (7, 9)


def test_a_variant_may_have_files_and_values_of_its_own(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("model: {optimizer: {lr: 1e-5}}\ndata: {steps_per_task: 3}\n")
    path = write(
        set={"data.steps_per_task": 8},
        axes={"lr": [0.1, 0.2], "method": {"a": None, "b": {"base": "other.yaml", "axes": {"lr": [7e-5]}}}},
    )
    cells = read_sweep(path).cells()
    assert [cell.name for cell in cells] == ["lr=0.1,a", "lr=0.2,a", "lr=7e-05,b"]
    assert cells[-1].settings["model"]["optimizer"]["lr"] == 7e-5  # values stand above files
    assert cells[-1].settings["data"]["steps_per_task"] == 8  # and so does what every cell sets


def test_a_learning_rate_without_a_point_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: [1e-3, 2E5, -3e+2, 1.5e-3, x1e3, 12]\n")
    assert read_yaml(tmp_path / "a.yaml")["lr"] == [1e-3, 2e5, -300.0, 1.5e-3, "x1e3", 12]


def test_dotted_keys_enter_init_args_and_lists() -> None:
    settings = overlay(BASE, {"model.adapter.rank": 8, "data.tasks.1": "C", "model.optimizer.init_args.x": 1})
    assert settings["model"]["adapter"]["init_args"] == {"rank": 8}
    assert settings["data"]["tasks"] == ["A", "C"]
    assert BASE["data"]["tasks"] == ["A", "B"]
    assert overlay({"model": {"adapter": "LoRAConfig"}}, {"model.adapter.rank": 2}) == {
        "model": {"adapter": {"class_path": "LoRAConfig", "init_args": {"rank": 2}}}
    }


def test_signature_ignores_where_a_run_is_written_and_nothing_else() -> None:
    same = overlay(BASE, {"name": "x", "save_dir": "y", "trainer.enable_progress_bar": False})
    assert signature(overlay(BASE, {"trainer": {}})) == signature(same)
    assert signature(overlay(BASE, {"model.adapter.rank": 5})) != signature(BASE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axes": {"sed": [1]}}, "axes.sed: no key of a configuration; did you mean 'seed'?"),
        ({"axes": {"lr": []}}, "axes.lr: give a list of values, or a mapping"),
        ({"axes": {"lr": [1, 1]}}, "axes.lr: a value stands twice"),
        ({"axes": {}}, "axes: name at least one axis"),
        ({"axes": {"m": {"a": 3}}}, "axes.m.a: a variant maps keys to values"),
        ({"axes": {"m": {"a": {"axes": {"lr": [1]}}}}}, "axes.m.a.axes: 'lr' is no axis of values"),
        ({"axes": {"m": {"a": {"base": "absent.yaml"}}}}, "absent.yaml: No such file"),
        ({"axes": {"lr": [1]}, "exclud": []}, "no key 'exclud'; did you mean 'exclude'?"),
        ({"axes": {"lr": [1]}, "exclude": [{"sed": 1}]}, "exclude: no key 'sed'"),
        ({"axes": {"lr": [1]}, "exclude": [{"lr": 1}]}, "exclude leaves no cell"),
        ({"axes": {"m": {"a": None}}, "include": [{"m": "b"}]}, "include: m has no option b"),
        ({"axes": {"lr": [1]}, "select": {"axis": "m"}}, "select.axis: name an axis of values"),
        ({"axes": {"m": {"a": None}, "s": None}, "exclude": [{"m": "b"}]}, "axes.s: give a list"),
        ({"axes": {"m": {"a": None, "c": None}}, "exclude": [{"m": ["a", "b"]}]}, "exclude: m has no option b; it has"),
        ({"axes": {"lr": [0.1, 0.2]}, "exclude": [{"lr": 0.3}]}, "exclude: lr has no option 0.3; it has 0.1, 0.2"),
        ({"axes": {"lr": [1], "m": {"a": None}}, "select": {"axis": ["lr"]}}, "select.axis: name an axis of values"),
        ({"axes": {"lr": [1], "m": {"a": None}}, "select": {"axis": "lr", "per": "m"}}, "select.per is 'm'; give a"),
        ({"axes": {"lr": [1]}, "select": {"axis": "lr", "tasks": [1]}}, "select.tasks is [1]; give first, all"),
        ({"axes": {"lr": [1]}, "select": {"axis": "lr", "tasks": True}}, "select.tasks is True; give first, all"),
        (
            {"axes": {"lr": [1], "m": {"a": None}}, "select": {"axis": "lr", "per": [], "fixed": {"m": "zzz"}}},
            "select.fixed: m has no option zzz; it has a",
        ),
        ({"axes": {"lr": [1]}, "select": {"axis": "lr", "metric": "ap"}}, "metric: no 'ap'; did you mean 'AP'?"),
        ({"axes": {"lr": [1]}, "select": {"axis": "lr", "metric": "perplexty"}}, "did you mean 'perplexity'?"),
        ({"axes": {"lr": [1]}, "select": {"axis": "lr", "metric": ["AP"]}}, "select.metric: no '['AP']'"),
        ({"axes": {"lr": [1]}, "select": {"axis": "lr", "metric": "BWT"}}, "BWT needs two tasks: give 2, more, or all"),
        ({"axes": {"lr": [1]}, "select": {"axis": "lr", "metric": "forgetting", "tasks": 1}}, "forgetting needs two"),
        ({"axes": {"lr": [1]}, "select": {"axis": "lr", "metrc": 1}}, "no key 'metrc'; did you mean 'metric'?"),
        ({"axes": {"lr": [1]}, "select": {"axis": "lr", "per": ["m"]}}, "'m' is no other axis"),
        ({"axes": {"lr": [1]}, "set": {"model.adapter.rank.x": 1}}, "model.adapter.rank is 4"),
        ({"axes": {"m": {"a b": None, "a-b": {"seed_everything": 3}}}}, "two cells named 'a-b' differ"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str], content: dict[str, Any], message: str
) -> None:
    assert sweep(write(**content), "--dry_run") == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert message in told[0]


def test_a_search_wants_what_is_better(write: Callable[..., Path]) -> None:
    def mode(**select: Any) -> str:
        read = read_sweep(write(axes={"lr": [1]}, select={"axis": "lr", **select})).select
        assert read is not None
        return read.mode

    assert [mode(metric=name) for name in ("perplexity", "perplexity_ratio")] == ["min", "min"]
    assert mode(metric="forgetting", tasks=2) == "min"
    assert [mode(), mode(metric="base_retention"), mode(metric="task/A"), mode(metric="base/past")] == ["max"] * 4
    assert mode(metric="perplexity", mode="max") == "max"


def test_keys_that_stand_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1\nlr: 2\n")
    with pytest.raises(ConfigError, match="key 'lr' stands twice"):
        read_yaml(tmp_path / "a.yaml")


# --------------------------------------------------------------------------------------------------- the running


def test_cells_are_run_once_and_results_kept(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(axes={"lr": [0.001, 0.01], "seed": [1, 2]})
    assert sweep(path, "--jobs", "2", "--threads", "3") == 0
    out = capsys.readouterr().out
    assert "runs: 4 to run, 0 finished before" in out
    found = results(path)
    assert sorted(found) == [f"lr={lr},seed={seed}" for lr in ("0.001", "0.01") for seed in (1, 2)]
    record = found["lr=0.01,seed=2"]
    assert record["axes"] == {"lr": 0.01, "seed": 2}
    assert record["metrics"]["AP"] == 0.92
    assert record["rows"]["tasks"]["A"]["scores"][0] == "".join("1" if (i * 7 + 2) % 20 < 2 else "0" for i in range(20))
    assert record["memory_mb"] > 1
    folder = path.parent / "runs" / "lr=0.01,seed=2"
    assert "threads 3" in (folder / "log.txt").read_text()
    assert yaml.safe_load((folder / "fit.yaml").read_text())["model"]["optimizer"]["lr"] == 0.01

    before = (path.parent / "runs" / "results.jsonl").read_bytes()
    assert sweep(path) == 0
    assert "to run" not in capsys.readouterr().out
    assert (path.parent / "runs" / "results.jsonl").read_bytes() == before
    assert len(list((path.parent / "runs").rglob("version_*"))) == 4


def test_changed_settings_run_anew_beside_the_old_run(write: Callable[..., Path]) -> None:
    path = write(axes={"seed": [1]})
    assert sweep(path) == 0
    assert sweep(write(axes={"seed": [1]}, set={"model.optimizer.lr": 0.01})) == 0
    assert results(path)["seed=1"]["metrics"]["AP"] == 0.91
    assert len(list((path.parent / "runs" / "seed=1").glob("version_*"))) == 2
    # Back again: the newest run has other settings, so nothing is taken for finished that is not.
    assert sweep(write(axes={"seed": [1]})) == 0
    assert results(path)["seed=1"]["metrics"]["AP"] == 0.73


def test_results_of_old_settings_are_not_mixed_in(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(write(axes={"lr": [0.001, 0.02], "seed": [1]})) == 0
    path = write(axes={"lr": [0.001, 0.01], "seed": [1]})
    capsys.readouterr()
    assert sweep(path) == 0
    out = capsys.readouterr().out
    told = [line for line in out.splitlines() if line.startswith("left out")]
    assert len(told) == 1
    assert "1 finished with settings that the sweep no longer has (lr=0.02,seed=1); their folders stay" in told[0]
    assert sorted(results(path)) == ["lr=0.001,seed=1", "lr=0.01,seed=1"]
    assert not any(line.startswith("lr=0.02") for line in out.splitlines())
    assert (path.parent / "runs" / "lr=0.02,seed=1" / "version_0" / "continual.json").is_file()
    path = write(axes={"lr": [0.001, 0.01], "seed": [1]}, set={"data.steps_per_task": 7})  # every cell is another one
    assert sweep(path, "--only", "lr=0.01") == 0
    assert list(results(path)) == ["lr=0.01,seed=1"]


def test_only_keeps_what_others_have_left(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(axes={"method": {"a": None, "b": None}, "lr": [0.001, 0.008], "seed": [1]}, select=SELECT)
    assert sweep(path) == 0
    before = results(path)
    for options in (("--only", "method=a"), ("--stage", "select", "--only", "method=b"), ("--only", "lr=1e-3")):
        assert sweep(path, *options) == 0
        assert results(path) == before
    assert "left out" not in capsys.readouterr().out
    # another search: b's old search does not count, and what b's runs should be is open until it is made
    assert sweep(write(axes={"method": {"a": None, "b": None}, "lr": [0.001, 0.008], "seed": [1]},
                       select={**SELECT, "set": {"forgetting.limit": 30}}), "--only", "method=a") == 0  # fmt: skip
    assert "left out of results.jsonl: 4 finished" in capsys.readouterr().out
    assert sorted(results(path)) == ["a,lr=0.008,seed=1", "b,lr=0.008,seed=1", "select/a,lr=0.001", "select/a,lr=0.008"]


def test_runs_of_a_value_that_lost_leave_the_results(write: Callable[..., Path]) -> None:
    assert sweep(write(axes={"lr": [0.001, 0.008], "seed": [1]}, select=SELECT)) == 0
    path = write(axes={"lr": [0.001, 0.008, 0.01], "seed": [1]}, select=SELECT)
    assert sweep(path) == 0
    assert [name for name in results(path) if not name.startswith("select/")] == ["lr=0.01,seed=1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "seed=3"), "--only: axis seed has no '3'; it has 1, 2"),
        (("--only", "lr=1e-4"), "--only: axis lr has no '1e-4'; it has 0.001, 0.02"),
        (("--only", "method=b", "--only", "lr=0.001"), "--only leaves no cell"),
    ],
)
def test_only_refuses_what_the_sweep_does_not_have(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    path = write(axes={"method": {"a": None, "b": {"axes": {"lr": [0.02]}}}, "lr": [0.001], "seed": [1, 2]})
    assert sweep(path, "--dry_run", *options) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert message in told[0]
    assert sweep(path, "--dry_run", "--only", "lr=1e-3") == 0
    assert capsys.readouterr().out.count("to do") == 2
    assert sweep(path, "--dry_run", "--only", "lr=2e-2") == 0
    assert capsys.readouterr().out.count("to do") == 2


def test_letters_that_end_lines_elsewhere_do_not_break_a_sweep(write: Callable[..., Path]) -> None:
    path = write(axes={"seed": [1]}, set={"data.tasks": ["A\u2028", "B"]})
    assert sweep(path) == 0
    assert sweep(path) == 0
    lines = (path.parent / "runs" / "results.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0])["tasks"] == ["A\u2028", "B"]


def test_a_failed_cell_is_told_and_stops_no_other(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {"what": {"bad": {"model.mode": "fail"}, "dead": {"model.mode": "die"}, "good": None}, "seed": [1]}
    path = write(axes=axes)
    assert sweep(path) == 1
    out = capsys.readouterr().out
    assert "failed: bad,seed=1: model.adapter.rank is 3000 (" in out
    assert "failed: dead,seed=1: killed by SIGKILL" in out
    assert list(results(path)) == ["good,seed=1"]


def test_a_stopped_sweep_ends_its_children_and_goes_on(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(axes={"what": {"hangs": {"model.mode": "hang"}, "later": None}, "seed": [1]})
    runs = path.parent / "runs"

    def stop() -> None:
        end = time.monotonic() + 30
        while not list(runs.rglob("last.ckpt")) and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert sweep(path) == 130
    stopper.join()
    assert results(path) == {}
    assert sweep(path, "--dry_run") == 0
    assert "hangs,seed=1  to resume" in capsys.readouterr().out
    assert sweep(path, "--jobs", "2") == 0  # the lock is free: no child is left
    assert sorted(results(path)) == ["hangs,seed=1", "later,seed=1"]
    assert len(list((runs / "hangs,seed=1").glob("version_*"))) == 1
    assert "--ckpt_path" in (runs / "hangs,seed=1" / "log.txt").read_text()


def test_two_sweeps_do_not_share_a_folder(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(axes={"seed": [1]})
    runs = path.parent / "runs"
    runs.mkdir()
    code = (
        f"import fcntl, time; file = open({str(runs / '.lock')!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert sweep(path) == 1
        other.kill()
    assert "another `secura sweep`" in capsys.readouterr().err
    assert sweep(path) == 0


# ------------------------------------------------------------------------------------------------- the selection

SELECT = {"axis": "lr", "tasks": "first", "rows": "validation", "set": {"forgetting.limit": 20}}
METHODS = {"a": None, "b": {"axes": {"lr": [0.02, 0.03]}}, "bad": {"model.mode": "fail"}}


def test_each_method_runs_at_the_value_that_won_its_search(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(axes={"method": METHODS, "lr": [0.001, 0.008, 0.05], "seed": [1, 2]}, select=SELECT)
    assert sweep(path, "--jobs", "2") == 1
    out = capsys.readouterr().out
    assert "a: lr 0.008 (learning_accuracy on validation rows: 0.001: 0.730, 0.008: 0.870, 0.05: 0.110)\n" in out
    assert "b: lr 0.02 " in out
    assert "at the edge of its values" in out
    assert "bad: no finished search run" in out
    found = results(path)
    main_cells = [name for name in found if not name.startswith("select/")]
    assert main_cells == ["a,lr=0.008,seed=1", "a,lr=0.008,seed=2", "b,lr=0.02,seed=1", "b,lr=0.02,seed=2"]
    searched = found["select/a,lr=0.008"]
    assert searched["tasks"] == ["A"]
    assert searched["meta"]["split"] == "validation"
    settings = yaml.safe_load((path.parent / "runs/select/a,lr=0.008/fit.yaml").read_text())
    assert settings["data"] == {"tasks": ["A"], "steps_per_task": [5], "probe": None}
    assert settings["forgetting"] == {"split": "validation", "limit": 20}
    notes = json.loads((path.parent / "runs" / "selection.json").read_text())
    assert [note["chosen"] for note in notes] == [0.008, 0.02, None]
    assert [note.get("at_edge") for note in notes] == [False, True, None]


def test_only_the_search_and_only_some_cells(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(axes={"method": METHODS, "lr": [0.001, 0.008], "seed": [1, 2]}, select=SELECT)
    assert sweep(path, "--stage", "select", "--only", "method=a") == 0
    assert list(results(path)) == ["select/a,lr=0.001", "select/a,lr=0.008"]
    assert sweep(path, "--only", "method=a", "--only", "seed=2") == 0
    assert "a,lr=0.008,seed=2" in results(path)
    assert len(results(path)) == 3
    assert sweep(path, "--only", "method=c") == 2
    assert "axis method has no 'c'" in capsys.readouterr().err


def test_ties_go_to_the_value_listed_first_and_min_wants_the_lowest(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {"lr": [0.012, 0.008], "seed": [1]}  # both are 0.002 from the best
    assert sweep(write(axes=axes, select=SELECT), "--stage", "select") == 0
    assert "all: lr 0.012" in capsys.readouterr().out
    low = {"axes": {"lr": [0.001, 0.008]}, "select": {**SELECT, "mode": "min"}, "name": "low"}
    assert sweep(write(**low), "--stage", "select") == 0
    assert "all: lr 0.001" in capsys.readouterr().out
    assert sweep(write(axes=axes, select={**SELECT, "metric": "nope"}), "--dry_run") == 2
    assert "select.metric: no 'nope'; choose among AP" in capsys.readouterr().err


def test_a_group_without_a_choice_is_a_failure(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    undefined = {**SELECT, "metric": "BWT", "tasks": 2}  # which the stand-in leaves undefined
    assert sweep(write(axes={"lr": [0.001], "seed": [1]}, select=undefined)) == 1
    assert "all: its search runs have no BWT, so none of its runs can start" in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_sweep_selects_on_validation_rows_and_finishes(tmp_path: Path) -> None:
    from tests.integration.conftest import TINY, merged

    quick = merged(TINY, {"data.steps_per_task": [2, 1, 2]})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(quick))
    grid = {
        "base": "base.yaml",
        "save_dir": str(tmp_path / "runs"),
        "axes": {"rank": {"r2": None, "bad": {"model.adapter.rank": 3000}}, "lr": [0.01], "seed": [3]},
        "select": {"axis": "lr", "per": []},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    assert sweep(path, "--jobs", "2") == 1
    found = results(path)
    assert sorted(found) == ["r2,lr=0.01,seed=3", "select/lr=0.01"]
    assert found["select/lr=0.01"]["meta"]["split"] == "validation"
    assert found["r2,lr=0.01,seed=3"]["meta"]["split"] == "test"
    assert found["r2,lr=0.01,seed=3"]["meta"]["seed"] == 3
    assert set(found["r2,lr=0.01,seed=3"]["rows"]["tasks"]) == {"first", "second", "third"}
    error = json.loads((tmp_path / "runs" / "bad,lr=0.01,seed=3" / "cell.json").read_text())["error"]
    assert error.startswith("model.adapter.rank is 3000")
