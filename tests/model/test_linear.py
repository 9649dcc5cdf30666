import pytest
import torch
from torch.nn.functional import linear

from model.linear import PACK_FROM, PackedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_packed_equals_plain(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(640, 512).to(dtype) / 22, torch.randn(640).to(dtype)
    assert weight.numel() >= PACK_FROM
    x, residual = torch.randn(rows, 512).to(dtype), torch.randn(rows, 640).to(dtype)
    layer, tolerance = PackedLinear(weight, bias), 1e-4 if dtype == torch.float32 else 0.1
    assert float((layer(x) - linear(x, weight, bias)).abs().max()) < tolerance
    assert float((layer.add_to(residual, x) - residual - linear(x, weight, bias)).abs().max()) < tolerance


def test_small_layers_are_left_alone_and_right() -> None:
    weight, x, residual = torch.randn(6, 8), torch.randn(3, 8), torch.randn(3, 6)
    layer = PackedLinear(weight)
    assert layer.packed is None
    assert torch.equal(layer.weight, weight)
    assert torch.allclose(layer(x), linear(x, weight), atol=1e-6)
    assert torch.allclose(layer.add_to(residual, x), residual + linear(x, weight), atol=1e-6)
