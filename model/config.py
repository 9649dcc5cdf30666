"""Frozen configuration of training runs and of what a bundle carries; a recipe is one TOML file read here.

Knows nothing of tensors: every value is a plain number, string or tuple, checked once at load.
"""

import dataclasses
import json
import math
import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAY_BE_ZERO = ("max_users", "max_cases", "length_pool", "patience", "seed")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the field."""


@dataclass(frozen=True)
class DataConfig:
    """Which data, and who is held out. MovieLens users are held out whole: none of their items is trained on, and
    `min_history`, `cases_per_user` and `seed` say how they are drawn and cut. Amazon's files bring their own split: of
    its validation and test users so many are used."""

    folder: str = ".data/ml-100k"
    held_out_users: int = 100
    validation_users: int = 30
    min_history: int = 10
    cases_per_user: int = 8
    max_users: int = 0  # 0: all
    seed: int = 7


@dataclass(frozen=True)
class TokenizerConfig:
    """Item embeddings and their residual quantisation; the last level, which separates collisions, is implied."""

    embedding_size: int = 64
    context_items: int = 10
    attribute_weight: float = 0.3
    codebook_sizes: tuple[int, ...] = (32, 32, 32)
    iterations: int = 50
    seed: int = 7


@dataclass(frozen=True)
class TargetConfig:
    """Shape and training of the target. `max_history_items` is also the serving limit of the prompt."""

    architecture: str = "llama"
    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 14
    num_heads: int = 4
    num_kv_heads: int = 4
    max_history_items: int = 20
    window_items: int = 32
    item_dropout: float = 0.1
    soon_items: int = 10
    soon_decay: float = 0.9
    length_pool: int = 0  # batches whose windows are sorted by length together (0: none are)
    epochs: int = 20
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    patience: int = 3
    seed: int = 7


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning on lists: the target's own most likely next items, ranked by beam search. Temperatures sharpen the
    ranking: that of the label, and that of the order the items are written in."""

    lists_per_user: int = 8
    list_items: int = 10
    beam_width: int = 32
    item_dropout: float = 0.1
    label_temperature: float = 0.5
    order_temperature: float = 0.25
    history_weight: float = 0.5
    epochs: int = 2
    batch_size: int = 8
    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    max_users: int = 0  # 0: all
    seed: int = 7


@dataclass(frozen=True)
class ListsConfig:
    """Lists the target writes for training users under the serving constraints: the draft's training data."""

    lists_per_user: int = 8
    list_items: int = 10
    batch_size: int = 32
    max_users: int = 0  # 0: all


@dataclass(frozen=True)
class DraftConfig:
    """Shape and training of the draft; `steps` draft steps are unrolled in training."""

    num_heads: int = 4
    intermediate_size: int = 352
    steps: int = 5
    step_loss_decay: float = 0.8
    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_fraction: float = 0.05
    seed: int = 7


@dataclass(frozen=True)
class AblationConfig:
    """Budget of the drafts that are compared with each other; all else is the draft's."""

    epochs: int = 2


@dataclass(frozen=True)
class AlignmentConfig:
    """Aligning drafts with the target's beams (AtSpeed). `weight` is the alignment's share of the loss, `top` the
    draft's K most likely codes that AtSpeed-S looks at; the sizes are those of the independent small model."""

    histories_per_user: int = 4
    beam_width: int = 20
    beams_per_history: int = 4
    item_dropout: float = 0.1
    weight: float = 0.7
    top: int = 20
    hidden_size: int = 64
    intermediate_size: int = 176
    num_layers: int = 2
    num_heads: int = 2
    epochs: int = 20
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    seed: int = 7


@dataclass(frozen=True)
class EvaluateConfig:
    """Size of the evaluation and the gates a bundle must pass to be written."""

    list_items: int = 10
    max_cases: int = 0  # 0: all
    require_beats_baselines: bool = True
    min_acceptance_length: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    name: str
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    lists: ListsConfig = field(default_factory=ListsConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def as_dict(self) -> dict[str, Any]:
        """The resolved recipe, to be written beside its results."""
        return dataclasses.asdict(self)


def with_data(recipe: Recipe, folder: Path | None) -> Recipe:
    """The recipe over data that lies elsewhere."""
    return replace(recipe, data=replace(recipe.data, folder=str(folder))) if folder else recipe


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises RecipeError naming the offending field."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as exc:
        raise RecipeError(f"{path}: {exc}") from exc
    return _recipe(path, document)


def recipe_of(path: Path, name: str) -> Recipe:
    """The recipe a stage was begun with, from the JSON file it left. Raises RecipeError naming the offending field."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise RecipeError(f"{path}: {exc}") from exc
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: must be an object")
    return _recipe(path, document | {"name": name})


def _recipe(path: Path, document: dict[str, Any]) -> Recipe:
    sections = {f.name: f for f in dataclasses.fields(Recipe) if f.name != "name"}
    unknown = set(document) - set(sections) - {"name"}
    if unknown:
        raise RecipeError(f"{path}: unknown section {sorted(unknown)[0]!r}")
    if not isinstance(document.get("name"), str):
        raise RecipeError(f"{path}: 'name' must be a string")
    # It names folders that are replaced as a whole: never a path.
    if not NAME.fullmatch(document["name"]):
        raise RecipeError(f"{path}: 'name' must be letters, digits, '.', '_' and '-', beginning with a letter or digit")
    built = {
        name: _section(path, name, section.default_factory, document.get(name, {}))
        for name, section in sections.items()
    }
    return Recipe(name=document["name"], **built)


def _section(path: Path, name: str, section: Any, values: Any) -> Any:
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: [{name}] must be a table")
    defaults = section()
    fields = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(defaults)}
    for key, value in values.items():
        if key not in fields:
            raise RecipeError(f"{path}: [{name}] has no field {key!r}")
        fields[key] = _checked(f"{path}: {name}.{key}", fields[key], value)
        whole_or_divisor = type(fields[key]) is int or key.endswith("_temperature")
        if whole_or_divisor and fields[key] == 0 and key not in MAY_BE_ZERO:
            raise RecipeError(f"{path}: {name}.{key} must be positive")
    return section(**fields)


def _checked(where: str, default: Any, value: Any) -> Any:
    if isinstance(default, tuple):
        if not (isinstance(value, list) and value and all(type(v) is int and v > 0 for v in value)):
            raise RecipeError(f"{where} must be a list of positive integers")
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise RecipeError(f"{where} must be {type(default).__name__}")
    if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
        raise RecipeError(f"{where} must be finite and not negative")
    return value
