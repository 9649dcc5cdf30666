import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from model.config import TargetConfig
from model.data.batches import token_batch
from model.data.histories import History, Split
from model.semantic_id import Codes, Vocabulary
from model.train.target import new_target, token_loss, train_target

VOCABULARY = Vocabulary.compact((4, 3, 2))
CONFIG = TargetConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    window_items=6,
    soon_items=2,
    epochs=4,
    batch_size=4,
    learning_rate=1e-2,
    patience=0,
)
CODES: dict[str, Codes] = {f"i{n}": (n % 4, n % 3, n % 2) for n in range(12)}


def users(count: int, seed: int) -> tuple[History, ...]:
    """Everybody walks round the items in steps of one."""
    rng = random.Random(seed)
    starts = [rng.randrange(12) for _ in range(count)]
    walks = [tuple(f"i{(start + n) % 12}" for n in range(9)) for start in starts]
    return tuple(History(str(n), walk, tuple(range(9))) for n, walk in enumerate(walks))


def split() -> Split:
    return Split(users(16, 0), users(4, 1), ())


class Killing(tuple[History, ...]):
    """Training users who can be read `epochs` times; then the run is killed."""

    left: int

    def __new__(cls, items: tuple[History, ...], epochs: int) -> "Killing":
        made = super().__new__(cls, items)
        made.left = epochs
        return made

    def __iter__(self) -> Iterator[History]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().__iter__()


def slow_loss(model: PreTrainedModel, windows: list[list[str]]) -> float:
    """Cross-entropy of the next code, window by window and token by token, for labels of one item."""
    total, count = 0.0, 0
    for window in windows:
        tokens = VOCABULARY.prompt(CODES[i] for i in window)
        log_probs = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0].float(), dim=-1)
        for place, token in enumerate(tokens):
            if VOCABULARY.slot(token) < VOCABULARY.num_levels:
                total -= log_probs[place - 1, token].item()
                count += 1
    return total / count


def test_the_loss_is_the_mean_over_code_tokens_and_padding_does_not_count() -> None:
    model = new_target(CONFIG, VOCABULARY)
    windows = [["i0", "i1", "i2", "i3"], ["i5", "i7"], ["i2", "i11", "i4"]]
    batch = token_batch(windows, CODES, VOCABULARY, 1, 0.9)
    with torch.no_grad():
        assert token_loss(model, batch).item() == pytest.approx(slow_loss(model, windows), abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_new_target_has_the_shape_of_the_recipe_and_equal_seeds_agree(architecture: str) -> None:
    config = replace(CONFIG, architecture=architecture)
    model = new_target(config, VOCABULARY)
    assert model.config.model_type == architecture
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (VOCABULARY.size, 2)
    twin, other = new_target(config, VOCABULARY), new_target(replace(config, seed=8), VOCABULARY)
    weights = [m.state_dict()["lm_head.weight"] for m in (model, twin, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"target\.architecture"):
        new_target(replace(CONFIG, architecture="gpt5"), VOCABULARY)


def test_training_learns_what_follows(tmp_path: Path) -> None:
    model, result = train_target(split(), CODES, VOCABULARY, replace(CONFIG, epochs=12, soon_items=1), tmp_path)
    assert result.validation[-1] < result.validation[0] / 1.5
    assert not model.training
    with torch.no_grad():
        tokens = torch.tensor([VOCABULARY.prompt(CODES[f"i{n}"] for n in (3, 4, 5, 6))])
        best = int(model(input_ids=tokens).logits[0, -1].argmax())
    assert best == VOCABULARY.item_tokens(CODES["i7"])[0]


def test_training_resumed_ends_where_uninterrupted_training_does(tmp_path: Path) -> None:
    whole, result = train_target(split(), CODES, VOCABULARY, replace(CONFIG, item_dropout=0.2), tmp_path / "whole")
    killed = Killing(split().train, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train_target(
            Split(killed, split().validation, ()), CODES, VOCABULARY, replace(CONFIG, item_dropout=0.2), tmp_path / "k"
        )
    again, second = train_target(split(), CODES, VOCABULARY, replace(CONFIG, item_dropout=0.2), tmp_path / "k")
    assert second == result
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
