"""Every shipped configuration that needs no download is fitted, cut to a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from secura_lightning.cli import fit

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
POCKET = [path for path in CONFIGS if yaml.safe_load(path.read_text())["model"].get("base", "pocket") == "pocket"]


def test_every_config_says_what_it_is_and_how_to_run_it() -> None:
    for path in CONFIGS:
        head = path.read_text().splitlines()[:3]
        assert head[0].startswith("# What:"), path.name
        assert head[1].startswith("# Run:"), path.name
        assert f"configs/{path.name}" in "".join(head[1:]), path.name


# The grid of adapters and strategies runs every strategy already: by default one of them shows that its file works. The
# two that calibrate on hundreds of samples take longest.
STRATEGIES = ("agem", "derpp", "ewc", "guard", "ilora", "l2sp", "lwf")
LATER = [f"pocket_{name}" for name in (*STRATEGIES, "lora_null", "lora_null_seq", "recommended")]


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.slow if path.stem in LATER else (), id=path.stem) for path in POCKET]
)
def test_pocket_config_runs_to_the_end(path: Path, tmp_path: Path) -> None:
    cut = ["--data.steps_per_task", "2", "--data.epochs_per_task", "null", "--forgetting.limit", "2"]
    if path.stem == "pocket_guard":  # nothing to guard without the probe
        cut += ["--trainer.callbacks.init_args.limit", "4", "--trainer.callbacks.init_args.bisections", "1"]
    elif path.stem != "quickstart":  # the probe's texts take longest, and one config shows that it works
        cut += ["--data.probe", "null"]
    if path.stem == "pocket_pretrain":
        cut += ["--data.tasks.init_args.n_documents", "200"]
    fit.main(["--config", str(path), "--save_dir", str(tmp_path), "--data.batch_size", "2", *cut])
    assert list(tmp_path.rglob("continual.json"))
    assert list(tmp_path.rglob("last.ckpt"))
