import pytest
import torch
from torch.nn.functional import linear

from model.linear import PACK_FROM, PackedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_packed_equals_plain(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(512, 320).to(dtype) / 18, torch.randn(512).to(dtype)
    assert weight.numel() >= PACK_FROM
    x = torch.randn(2, rows, 320).to(dtype)
    difference = (PackedLinear(weight, bias)(x) - linear(x, weight, bias)).abs().max()
    assert float(difference) < (1e-4 if dtype == torch.float32 else 0.1)


def test_small_layers_are_left_alone() -> None:
    assert PackedLinear(torch.randn(8, 8)).packed is None
