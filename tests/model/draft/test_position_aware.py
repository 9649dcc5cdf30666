import pytest
import torch

from model.draft.position_aware import PositionAware


def test_slot_and_step_enter_as_the_formulas_say() -> None:
    torch.manual_seed(0)
    module = PositionAware(8, 6, 3, item=True, step="gated")
    assert module.item is not None
    assert module.step is not None
    assert module.gate is not None
    assert module.alpha is not None
    module.alpha.data.fill_(0.3)
    embedded, slots, fused = torch.randn(2, 5, 8), torch.randint(0, 6, (2, 5)), torch.randn(2, 5, 8)
    assert torch.allclose(module.with_slot(embedded, slots), embedded + 0.3 * module.item.weight[slots])
    step = module.step.weight[1].expand_as(fused)
    gate = torch.sigmoid(module.gate(torch.cat([fused, step], dim=-1)))
    assert torch.allclose(module.with_step(fused, 1), fused + gate * step, atol=1e-6)


def test_steps_past_the_trained_ones_use_the_last(tmp_path: object) -> None:
    module = PositionAware(8, 6, 3, item=False, step="gated")
    fused = torch.randn(1, 8)
    assert torch.equal(module.with_step(fused, 7), module.with_step(fused, 2))


@pytest.mark.parametrize(
    ("item", "step", "parameters"),
    [(False, "none", 0), (True, "none", 2), (False, "ungated", 1), (False, "gated", 3), (True, "gated", 5)],
)
def test_every_part_can_be_left_out_for_an_ablation(item: bool, step: str, parameters: int) -> None:
    module = PositionAware(8, 6, 3, item=item, step=step)  # type: ignore[arg-type]
    assert len(list(module.parameters())) == parameters
    if parameters == 0:
        x = torch.randn(2, 8)
        assert module.with_slot(x, torch.tensor([0, 1])) is x
        assert module.with_step(x, 0) is x


def test_everything_is_learned() -> None:
    module = PositionAware(8, 6, 3, item=True, step="gated")
    out = module.with_step(module.with_slot(torch.randn(4, 8), torch.arange(4)), 1)
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())
