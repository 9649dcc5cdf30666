"""The one training loop: AdamW, warm-up then cosine, clipping, best weights by validation, resumable each epoch.

Knows nothing of what is trained, nor where: batches and losses are given, and weights stay on their device. The state
on disk is safetensors and JSON, so a run that was killed continues at its last finished epoch and ends where an
uninterrupted one would.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Batch = TypeVar("Batch")


class FitConfig(Protocol):
    """What the loop needs of a stage's configuration."""

    @property
    def epochs(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup_fraction(self) -> float: ...


@dataclass(frozen=True)
class FitResult:
    """Validation losses in nats, one an epoch, and the epoch whose weights were kept."""

    validation: tuple[float, ...]
    best_epoch: int


def fit(
    module: torch.nn.Module,
    batches: Callable[[int], Sequence[Batch]],
    loss: Callable[[Batch], torch.Tensor],
    validate: Callable[[], float],
    config: FitConfig,
    folder: Path | None,
    *,
    label: str,
    patience: int = 0,
) -> FitResult:
    """Train `module` in place and leave it with its best weights. `batches(epoch)` must depend on the epoch alone.
    Without a `folder` nothing is written: the last weights stay, and a killed run begins anew."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    decayed = [p for p in trained.values() if p.dim() > 1]
    plain = [p for p in trained.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    state = _State(folder, trained, optimizer)
    state.resume()
    with progress_bar() as progress:
        for epoch in range(len(state.losses), config.epochs):
            if patience and epoch - state.best_epoch > patience:
                break
            chunk = batches(epoch)
            task = progress.add_task(f"{label} {epoch + 1}/{config.epochs}", total=len(chunk), loss=math.nan)
            module.train()
            for index, batch in enumerate(chunk):
                rate = _schedule((epoch + index / len(chunk)) / config.epochs, config.warmup_fraction)
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * rate
                value = loss(batch)
                value.backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress.update(task, advance=1, loss=value.item())
            module.eval()
            with torch.no_grad():
                state.finish_epoch(validate())
            progress.update(task, description=f"{label} {epoch + 1}/{config.epochs} val {state.losses[-1]:.4f}")
    state.restore_best()
    return FitResult(tuple(state.losses), state.best_epoch)


class _State:
    """Weights, optimiser moments and losses, written after each epoch where there is a folder for them."""

    def __init__(
        self, folder: Path | None, trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self.folder, self.trained, self.optimizer = folder, trained, optimizer
        self.losses: list[float] = []

    @property
    def best_epoch(self) -> int:
        return self.losses.index(min(self.losses)) if self.losses else 0

    def finish_epoch(self, loss: float) -> None:
        self.losses.append(loss)
        if self.folder is None:
            return
        weights = {n: p.detach().contiguous() for n, p in self.trained.items()}
        if self.best_epoch == len(self.losses) - 1:
            save_file(weights, self.folder / "best.safetensors")
        moments = {
            f"{name}/{key}": torch.as_tensor(value)
            for name, p in self.trained.items()
            for key, value in self.optimizer.state[p].items()
        }
        # One file holds everything and appears at once: a kill between two files would train an epoch twice.
        losses = json.dumps(self.losses)
        save_file(weights | moments, self.folder / "state.tmp", metadata={"losses": losses})
        (self.folder / "state.tmp").replace(self.folder / "state.safetensors")
        (self.folder / "losses.json").write_text(losses)

    def resume(self) -> None:
        if self.folder is None or not (path := self.folder / "state.safetensors").exists():
            return
        with safe_open(path, "pt") as file:
            losses = (file.metadata() or {}).get("losses")
        self.losses = json.loads(losses or (self.folder / "losses.json").read_text())
        tensors = load_file(path)
        for name, p in self.trained.items():
            p.data.copy_(tensors[name])
            state: dict[str, Any] = self.optimizer.state[p]
            for key, value in tensors.items():
                of, _, moment = key.rpartition("/")
                if of == name:  # moments lie beside their weight, the count of steps on the host
                    state[moment] = value.to(p.device) if value.dim() else value

    def restore_best(self) -> None:
        if self.folder is None:
            return
        best = load_file(self.folder / "best.safetensors")
        for name, p in self.trained.items():
            p.data.copy_(best[name])


def _schedule(done: float, warmup: float) -> float:
    """Learning-rate factor after the fraction `done` of training: linear warm-up, cosine to 5 %."""
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (done - warmup) / max(1e-9, 1 - warmup)))


class _Quiet:
    """Says nothing, where nothing is installed to say it with."""

    def __enter__(self) -> "_Quiet":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add_task(self, description: str, **_: object) -> int:
        del description
        return 0

    def update(self, task: int, **_: object) -> None:
        del task


def progress_bar() -> Any:
    """Bars with the time left, where `rich` is installed: a bare GPU machine trains without."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        return _Quiet()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
