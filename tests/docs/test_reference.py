"""The reference that the documentation's command builds holds the whole public interface."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import secura_lightning

ROOT = Path(__file__).parents[2]
OWN = Path(secura_lightning.__file__).parent


@pytest.mark.slow
def test_the_reference_is_built_and_whole(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="the extra `docs` is not installed")
    found = re.search(r"^python (docs/reference.py) (site)$", (ROOT / "docs/README.md").read_text(), re.M)
    assert found
    run = subprocess.run(
        [sys.executable, str(ROOT / found[1]), found[2]], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Error importing" not in run.stderr, run.stderr[-3000:]  # how pdoc tells of what cannot be imported
    site = tmp_path / "site"
    start = (site / "secura_lightning.html").read_text()
    for name in secura_lightning.__all__:
        assert name == "__version__" or f'id="{name}"' in start, name
    for file in OWN.rglob("*.py"):
        parts = file.relative_to(OWN.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if "configs" not in parts and not any(part.startswith("_") for part in parts):
            page = site.joinpath(*parts).with_suffix(".html")
            assert page.exists(), page
            assert not re.search(r'id="(?:\w+\.)?_[a-z]\w*"', page.read_text()), f"{page} shows private names"
