import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from secura_lightning.metrics import continual

NAN = float("nan")
# Three tasks; row 0 is the base.
R = [
    [0.1, 0.2, 0.3],
    [0.8, 0.3, 0.3],
    [0.9, 0.7, 0.5],
    [0.4, 0.6, 0.6],
]


def test_hand_computed_values() -> None:
    found = continual.summarise(R, [[0.5, 0.8, 0.0], [0.5, 0.8, 0.0], [0.5, 0.8, 0.0], [0.25, 0.9, 0.1]])
    assert found == {
        "AP": pytest.approx((0.4 + 0.6 + 0.6) / 3),
        "AIA": pytest.approx((0.8 + (0.9 + 0.7) / 2 + (0.4 + 0.6 + 0.6) / 3) / 3),
        "BWT": pytest.approx(((0.4 - 0.8) + (0.6 - 0.7)) / 2),
        "BWT_trace": pytest.approx(((0.4 - 0.8) + (0.6 - 0.7)) / 3),
        "forgetting": pytest.approx(((0.9 - 0.4) + (0.7 - 0.6)) / 2),
        "FWT": pytest.approx(((0.3 - 0.2) + (0.5 - 0.3)) / 2),
        "learning_accuracy": pytest.approx((0.8 + 0.7 + 0.6) / 3),
        # the third kind was unknown to the base: nothing to retain, but it counts as a change
        "base_retention": pytest.approx((0.25 / 0.5 + 1.0) / 2),
        "base_delta": pytest.approx(((0.25 - 0.5) + (0.9 - 0.8) + 0.1) / 3),
    }


def test_one_task_has_no_transfer_and_no_forgetting() -> None:
    found = continual.summarise([[0.1], [0.9]])
    assert found["AP"] == found["AIA"] == found["learning_accuracy"] == 0.9
    for name in ("BWT", "BWT_trace", "forgetting", "FWT", "base_retention", "base_delta"):
        assert found[name] is None


def test_base_alone_defines_nothing() -> None:
    found = continual.summarise([[0.1, 0.2], [None, None], [None, None]], [[0.5], [NAN], [NAN]])
    assert {name for name, value in found.items() if value is not None} == {"base_retention", "base_delta"}
    assert found["base_retention"] == 1.0
    assert found["base_delta"] == 0.0


def test_a_missing_cell_leaves_only_the_metrics_that_need_it_undefined() -> None:
    matrix = np.array(R)
    matrix[1, 2] = NAN  # task 3 before task 2 was learned: nobody needs it
    assert continual.summarise(matrix) == continual.summarise(R)
    matrix[1, 1] = NAN  # task 2 just before it was learned
    assert continual.forward_transfer(matrix) is None
    assert continual.average_performance(matrix) == pytest.approx(1.6 / 3)
    matrix[2, 0] = NAN
    assert continual.forgetting(matrix) is None
    assert continual.average_incremental_accuracy(matrix) is None
    assert continual.backward_transfer(matrix) == pytest.approx(-0.25)


def test_retention_of_a_base_that_knows_nothing_is_undefined() -> None:
    assert continual.base_retention([[0.0], [0.5]]) is None
    assert continual.base_delta([[0.0], [0.5]]) == 0.5
    assert continual.base_retention([[NAN, 0.5], [0.1, 0.5]]) is None


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (3,), (1, 0)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="T\\+1 rows and T columns"):
        continual.summarise(np.zeros(shape))


def matrices() -> st.SearchStrategy[np.ndarray]:
    return st.integers(2, 6).flatmap(lambda t: arrays(float, (t + 1, t), elements=st.floats(0, 1)))


@given(matrices())
def test_relations_between_metrics(matrix: np.ndarray) -> None:
    tasks = matrix.shape[1]
    found = continual.summarise(matrix)
    assert found["forgetting"] >= -found["BWT"] - 1e-12  # the best score is no lower than the first one
    assert found["BWT_trace"] * tasks == pytest.approx(found["BWT"] * (tasks - 1), abs=1e-12)
    # what was learned, minus what was lost since, is what is there
    assert found["AP"] == pytest.approx(found["learning_accuracy"] + found["BWT_trace"], abs=1e-12)
    assert -1 <= found["FWT"] <= 1


@given(matrices(), st.data())
def test_a_run_in_progress_counts_as_the_run_so_far(matrix: np.ndarray, data: st.DataObject) -> None:
    done = data.draw(st.integers(1, matrix.shape[1] - 1))
    partial = matrix.copy()
    partial[done + 1 :] = NAN
    assert continual.summarise(partial) == continual.summarise(matrix[: done + 1, :done])


@given(arrays(float, (3, 4), elements=st.floats(0.01, 1)))
def test_retention_lies_between_zero_and_one(kinds: np.ndarray) -> None:
    assert 0 <= continual.base_retention(kinds) <= 1
    assert continual.base_retention(np.stack([kinds[0], kinds[0]])) == 1


def test_import_does_not_load_torch() -> None:
    code = (
        "import sys, secura_lightning.metrics.continual, secura_lightning.metrics.text; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
