"""Fresh memory is what `new_empty` gives, whatever the size."""

import pytest
import torch
from llqr_mf.operators.fresh import HUGE, fresh_rows


@pytest.mark.parametrize("size", [0, 3, HUGE // 4 - 1, HUGE // 4, HUGE + 12345])
def test_fresh_memory_can_be_written_and_read(size):
    proto = torch.empty(0, dtype=torch.float64)
    out = fresh_rows(proto, 2, size)
    assert out.shape == (2, size) and out.dtype == proto.dtype and out.is_contiguous()
    torch.testing.assert_close(out.fill_(2.5), torch.full((2, size), 2.5, dtype=torch.float64))
