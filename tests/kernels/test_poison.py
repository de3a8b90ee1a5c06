import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_memory_holds_nothing_that_passes_for_a_result(dtype: torch.dtype) -> None:
    like = torch.zeros(4, dtype=dtype)
    for fresh in (torch.empty(4, dtype=dtype), torch.empty_like(like), like.new_empty(4)):
        if dtype.is_floating_point:
            assert fresh.float().isnan().all()
        else:
            assert (fresh == torch.iinfo(dtype).min).all()
