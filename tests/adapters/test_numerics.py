"""Building blocks that adapters share: exact on every layout and in every type of the base."""

from __future__ import annotations

import pytest
import torch

from secura_lightning.adapters import numerics
from secura_lightning.adapters.numerics import row_and_column_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided"])
def test_norms_of_rows_and_columns_come_from_one_reading(
    layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "_CPU_BLOCK", 256)  # 7 rows of 33, the last block shorter
    weight = torch.randn(66, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[:, 5] = 0
    weight = {"plain": weight, "transposed": weight.t(), "strided": weight[::2]}[layout]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    rows, columns = row_and_column_norms(weight, work)
    for found, dim in ((rows, 1), (columns, 0)):
        assert found.dtype == work
        tolerance = 1e-6 if work == torch.float32 else 1e-14
        expected = weight.double().norm(dim=dim).to(work)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
        assert int((found == 0).sum()) == int((expected == 0).sum())


def test_norms_of_rows_are_those_of_the_whole_matrix_bit_for_bit() -> None:
    weight = torch.randn(700, 801)
    assert torch.equal(row_and_column_norms(weight, torch.float32)[0], torch.linalg.vector_norm(weight, dim=1))
