import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.train.fit import FitResult, fit


@dataclass(frozen=True)
class Config:
    epochs: int = 4
    learning_rate: float = 0.05
    weight_decay: float = 0.1
    warmup_fraction: float = 0.2


class Killed(BaseException):
    """What a signal would do."""


class Task:
    """A regression that a small network learns."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        self.x = torch.randn(24, 3)
        self.y = self.x.prod(1, keepdim=True)
        self.steps = 0
        self.epochs: list[int] = []
        self.die_at = -1

    def batches(self, epoch: int) -> list[torch.Tensor]:
        self.epochs.append(epoch)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch))
        return [order[i : i + 8] for i in range(0, 24, 8)]

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if self.steps == self.die_at:
            raise Killed
        error: torch.Tensor = self.module(self.x[rows]) - self.y[rows]
        return error.square().mean()

    def error(self) -> float:
        with torch.no_grad():
            return float((self.module(self.x) - self.y).square().mean())

    def fit(
        self, folder: Path, config: Config | None = None, validate: Callable[[], float] | None = None, patience: int = 0
    ) -> FitResult:
        return fit(
            self.module,
            self.batches,
            self.loss,
            validate or self.error,
            config or Config(),
            folder,
            label="task",
            patience=patience,
        )

    def weights(self) -> list[float]:
        return torch.cat([p.flatten() for p in self.module.parameters()]).tolist()


@pytest.mark.parametrize("die_at", [1, 5, 6, 12])
def test_a_killed_run_resumes_where_an_uninterrupted_one_ends(tmp_path: Path, die_at: int) -> None:
    whole = Task()
    expected = whole.fit(tmp_path / "whole")
    first = Task()
    first.die_at = die_at
    with pytest.raises(Killed):
        first.fit(tmp_path / "killed")
    second = Task()
    assert second.fit(tmp_path / "killed") == expected
    assert second.weights() == whole.weights()
    assert second.epochs == list(range((die_at - 1) // 3, 4))
    states = [load_file(tmp_path / name / "state.safetensors") for name in ("whole", "killed")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_kill_between_the_files_of_an_epoch_trains_no_epoch_twice(tmp_path: Path) -> None:
    whole = Task()
    expected = whole.fit(tmp_path / "whole")
    first = Task()
    first.die_at = 7
    with pytest.raises(Killed):
        first.fit(tmp_path / "killed")
    losses = tmp_path / "killed" / "losses.json"
    losses.write_text(json.dumps(json.loads(losses.read_text())[:-1]))
    second = Task()
    assert second.fit(tmp_path / "killed") == expected
    assert second.weights() == whole.weights()


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, second = Task(), Task()
    result = first.fit(tmp_path)
    assert second.fit(tmp_path) == result
    assert second.steps == 0
    assert second.weights() == first.weights()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    task = Task()
    before = task.error()
    result = task.fit(tmp_path, Config(epochs=30))
    assert min(result.validation) < before / 2
    assert task.error() == pytest.approx(min(result.validation))


def test_the_weights_left_are_those_of_the_best_epoch(tmp_path: Path) -> None:
    task, kept = Task(), []
    losses = iter([3.0, 1.0, 2.0, 1.5])

    def validate() -> float:
        kept.append(task.weights())
        return next(losses)

    result = task.fit(tmp_path, validate=validate)
    assert result == FitResult((3.0, 1.0, 2.0, 1.5), 1)
    assert task.weights() == kept[1]
    assert kept[1] != kept[3]


def test_patience_ends_a_run_that_has_stopped_improving(tmp_path: Path) -> None:
    task, losses = Task(), iter([3.0, 1.0, *[2.0] * 8])
    result = task.fit(tmp_path, Config(epochs=10), lambda: next(losses), patience=2)
    assert result.validation == (3.0, 1.0, 2.0, 2.0)
    assert result.best_epoch == 1


def test_frozen_parameters_stay_as_they_are(tmp_path: Path) -> None:
    task = Task()
    first = task.module[0]
    assert isinstance(first, torch.nn.Linear)
    first.requires_grad_(False)
    before, free = first.weight.clone(), task.weights()
    task.fit(tmp_path)
    assert torch.equal(first.weight, before)
    assert task.weights() != free


def test_biases_are_not_decayed(tmp_path: Path) -> None:
    """With a loss that pulls nowhere, decay alone moves the weights."""
    task = Task()
    before = [p.detach().clone() for p in task.module.parameters()]
    fit(
        task.module,
        lambda epoch: [torch.arange(3)],
        lambda rows: sum((p.sum() * 0.0 for p in task.module.parameters()), torch.zeros(())),
        task.error,
        Config(weight_decay=0.5),
        tmp_path,
        label="nothing",
    )
    for old, new in zip(before, task.module.parameters(), strict=True):
        assert torch.equal(old, new) == (old.dim() == 1)


def test_the_learning_rate_warms_up_and_then_falls(tmp_path: Path) -> None:
    rates: list[float] = []
    weight = torch.nn.Linear(1, 1, bias=False)
    places = [weight.weight.item()]

    def loss(batch: int) -> torch.Tensor:
        places.append(weight.weight.item())
        return weight.weight.sum()

    fit(weight, lambda e: list(range(20)), loss, lambda: 0.0, Config(1, 0.01, 0.0, 0.5), tmp_path, label="rate")
    # AdamW with a constant gradient moves by the learning rate in each step.
    rates = [a - b for a, b in pairwise(places[1:])]
    assert rates.index(max(rates)) in (9, 10, 11)
    assert max(rates) == pytest.approx(0.01, rel=0.02)
    assert rates[0] < 0.0002
    assert rates[-1] < 0.002
    assert rates[:10] == sorted(rates[:10])
