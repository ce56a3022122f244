"""The shipped configurations can be listed and copied from anywhere, a checkout or an installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

from secura_lightning.cli.configs import available
from secura_lightning.cli.main import main
from secura_lightning.study.axes import SHIPPED
from secura_lightning.study.grid import read_sweep

ROOT = Path(__file__).parents[2]


def test_ls_names_every_config_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(lines) == len(files)
    told = dict(line.split(maxsplit=1) for line in lines)
    assert "study/pocket" in told
    assert told["quickstart"].startswith("SECURA learns four tasks")


def test_cp_gives_the_same_bytes_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "cp", "quickstart"]) == 0
    assert Path("quickstart.yaml").read_bytes() == (ROOT / "configs" / "quickstart.yaml").read_bytes()
    assert main(["configs", "cp", "quickstart"]) == 1
    assert "quickstart.yaml exists" in capsys.readouterr().err
    assert main(["configs", "cp", "quickstart.yaml", "--force"]) == 0
    assert main(["configs", "cp", "pocket_dora", "new/mine.yaml"]) == 0
    assert Path("new/mine.yaml").is_file()
    assert main(["configs", "cp", "study/smoke", "new"]) == 0
    assert read_sweep(Path("new/smoke.yaml")).cells()  # its base is found among the shipped ones
    assert main(["configs", "cp", "quickstrat"]) == 2
    assert "did you mean 'quickstart'?" in capsys.readouterr().err


def test_the_package_reaches_the_top_level_folder_and_nothing_else() -> None:
    assert SHIPPED.resolve() == (ROOT / "configs").resolve()
    assert set(available().values()) == set(SHIPPED.rglob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in available() if name.startswith("study/")])
def test_every_study_expands(name: str) -> None:
    path = available()[name]
    sweep = read_sweep(path)
    cells = [*sweep.search(), *sweep.cells()]
    assert len({cell.id for cell in cells}) == len(cells)
    head = path.read_text().splitlines()
    assert head[0].startswith("# What:")
    assert f"configs/{name}.yaml" in head[1]
