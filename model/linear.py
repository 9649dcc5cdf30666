"""PackedLinear: a frozen linear layer stored the way small batches on a CPU are fastest.

Large weights are packed once for oneDNN, which reads them twice as fast as a plain `linear` does and pays little more
for eight rows than for one. Below `PACK_FROM` elements the weight sits in the processor's cache and the packed call
costs more than it saves; those are kept transposed, as the plain product reads them best. Knows nothing of models.
The oneDNN operators are private to torch: where they are missing or refuse, the plain product is used, and a test
holds parity.
"""

import torch

Tensor = torch.Tensor
PACK_FROM = 250_000


class PackedLinear:
    """`x @ weight.T (+ bias)` for x [m, in]; weight [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        # A GPU's products read a weight as it lies in a checkpoint, a CPU's plain ones best transposed.
        weight = weight.detach()
        self.columns = weight.contiguous().t() if weight.is_cuda else weight.t().contiguous()
        self.bias = None if bias is None else bias.detach()
        self.packed: Tensor | None = None
        if weight.device.type == "cpu" and weight.numel() >= PACK_FROM and torch.backends.mkldnn.is_available():
            self.packed = _pack(weight.contiguous())

    @property
    def weight(self) -> Tensor:
        return self.columns.t()

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return out
        return torch.mm(x, self.columns) if self.bias is None else torch.addmm(self.bias, x, self.columns)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + self(x)`, in one call where that is cheaper."""
        if self.packed is None and self.bias is None:
            return torch.addmm(residual, x, self.columns)
        return residual + self(x)


def _pack(weight: Tensor) -> Tensor | None:
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        probe = torch.ones(1, weight.shape[1], dtype=weight.dtype)
        torch.ops.mkldnn._linear_pointwise(probe, packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return None
    return packed
