import pytest
import torch

from model.layer import UnitNorm, grouped


@pytest.mark.parametrize("size", [8, 11])
def test_the_norm_of_a_gpu_and_that_of_a_cpu_differ_by_what_weights_take_over(size: int) -> None:
    x = torch.randn(5, size) * torch.tensor([1e-3, 0.1, 1, 10, 0]).unsqueeze(1)
    norm = UnitNorm(size, 1e-5, "cpu")
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    assert torch.allclose(norm(x) * norm.scale, expected, atol=1e-6)
    norm.fused = True  # what a CUDA device chooses
    assert torch.allclose(norm(x) * norm.scale_on("cuda", size), expected, atol=1e-6)


def test_a_mask_is_repeated_for_heads_that_share_keys_as_the_queries_lie() -> None:
    mask = torch.randn(2, 1, 3, 7)
    assert grouped(None, 4, 2) is None
    assert grouped(mask, 4, 4) is mask
    shared = grouped(mask, 6, 2)
    assert shared is not None
    # Queries [B, H, n, s] laid out as [B, G, (H/G) n, s]: the head comes before the token.
    assert torch.equal(shared.view(2, 1, 3, 3, 7), mask.unsqueeze(2).expand(-1, -1, 3, -1, -1))
