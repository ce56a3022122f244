"""What the stack says beside a run: no advertisements, and our own warnings in one line."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from secura_lightning.cli import fit


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back after the test
    with warnings.catch_warnings():
        fit.quiet()


@pytest.mark.usefixtures("quiet")
def test_own_warnings_do_not_show_where_they_stand() -> None:
    own = str(Path(fit.__file__).parents[1] / "data" / "benchmark.py")
    assert warnings.formatwarning("2 rows left out", UserWarning, own, 242) == "warning: 2 rows left out\n"
    others = warnings.formatwarning("old", FutureWarning, "/elsewhere/torch/x.py", 7)
    assert "/elsewhere/torch/x.py:7" in others


@pytest.mark.usefixtures("quiet")
def test_epochs_and_advertisements_are_dropped_and_nothing_else() -> None:
    [*filters] = logging.getLogger("lightning.pytorch.utilities.rank_zero").filters

    def passes(message: str) -> bool:
        record = logging.LogRecord("x", logging.INFO, "", 0, message, None, None)
        return all(rule.filter(record) for rule in filters if isinstance(rule, logging.Filter))

    assert not passes("`Trainer.fit` stopped: `max_epochs=1` reached.")
    assert not passes("Tip: try installing [litlogger](https://example.org)")
    assert passes("`Trainer.fit` stopped: `max_steps=3` reached.")
    assert passes("GPU available: False, used: False")
