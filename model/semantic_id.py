"""Vocabulary: where codes, the separator and the prompt's own tokens live among the target's tokens.

A code is shifted into its level's range of the vocabulary; one separator token ends an item. The ranges may lie
anywhere (an imported LLM has them after its text tokens). Knows nothing of items, tries or tensors.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Codes = tuple[int, ...]


@dataclass(frozen=True)
class Vocabulary:
    """Token layout. `level_offsets[level] + code` is the token of a code; slots are 0..num_levels-1, then the
    separator's slot `num_levels`, then the slot of everything else, `prompt_slot`. `separator` ends an item that
    was watched. `list_separator` ends one that is recommended, and the prompt that asks for a list: what follows it
    was not watched. A target that was never taught the difference has one token for both."""

    codebook_sizes: tuple[int, ...]
    level_offsets: tuple[int, ...]
    separator: int
    prompt_prefix: tuple[int, ...]
    list_separator: int
    size: int

    def __post_init__(self) -> None:
        if len(self.codebook_sizes) != len(self.level_offsets) or not self.codebook_sizes:
            raise ValueError("level_offsets must have one entry per level")
        ranges = sorted((o, o + n) for o, n in zip(self.level_offsets, self.codebook_sizes, strict=True))
        if any(a[1] > b[0] for a, b in pairwise(ranges)):
            raise ValueError("level ranges overlap")
        if min(self.codebook_sizes) < 1:
            raise ValueError("a codebook needs at least one code")
        separators = (self.separator, self.list_separator)
        if ranges[-1][1] > self.size or any(lo <= token < hi for lo, hi in ranges for token in separators):
            raise ValueError("level ranges and separator must be distinct tokens below size")
        if not self.prompt_prefix:
            raise ValueError("prompt_prefix needs at least one token")
        own = (*self.prompt_prefix, *separators)
        if not all(0 <= token < self.size for token in (ranges[0][0], *own)):
            raise ValueError("every token must lie in 0..size-1")

    @classmethod
    def compact(cls, codebook_sizes: Sequence[int]) -> "Vocabulary":
        """The layout of a target trained from nothing: padding 0, beginning 1, separator 2, list separator 3,
        then the levels."""
        offsets, total = [], 4
        for size in codebook_sizes:
            offsets.append(total)
            total += size
        return cls(tuple(codebook_sizes), tuple(offsets), 2, (1,), 3, total)

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def tokens_per_item(self) -> int:
        return self.num_levels + 1

    @property
    def separator_slot(self) -> int:
        return self.num_levels

    @property
    def prompt_slot(self) -> int:
        return self.num_levels + 1

    @property
    def num_slots(self) -> int:
        return self.num_levels + 2

    @property
    def max_codebook_size(self) -> int:
        return max(self.codebook_sizes)

    def slot(self, token: int) -> int:
        """Slot of a token: its level, the separator's, or the prompt's."""
        for level, (offset, size) in enumerate(zip(self.level_offsets, self.codebook_sizes, strict=True)):
            if offset <= token < offset + size:
                return level
        return self.separator_slot if token in (self.separator, self.list_separator) else self.prompt_slot

    def item_tokens(self, codes: Codes) -> list[int]:
        """Tokens of one watched item, separator included. Raises ValueError when a code is out of its level's range."""
        if len(codes) != self.num_levels:
            raise ValueError(f"an item has {self.num_levels} codes, not {len(codes)}")
        for level, code in enumerate(codes):
            if not 0 <= code < self.codebook_sizes[level]:
                raise ValueError(f"code {level} is outside its codebook")
        return [o + c for o, c in zip(self.level_offsets, codes, strict=True)] + [self.separator]

    def prompt(self, history: Iterable[Codes]) -> list[int]:
        """Tokens that ask for the next item: the prefix, then each history item, oldest first."""
        return [*self.prompt_prefix, *(token for codes in history for token in self.item_tokens(codes))]

    def list_prompt(self, history: Iterable[Codes]) -> list[int]:
        """Tokens that ask for a list: the prompt, and the list separator where that is a token of its own."""
        asking = [self.list_separator] if self.list_separator != self.separator else []
        return self.prompt(history) + asking

    def list_item_tokens(self, codes: Codes) -> list[int]:
        """Tokens of one recommended item, list separator included. Raises ValueError as `item_tokens` does."""
        return [*self.item_tokens(codes)[:-1], self.list_separator]

    def as_dict(self) -> dict[str, Any]:
        return {
            "codebook_sizes": list(self.codebook_sizes),
            "level_offsets": list(self.level_offsets),
            "separator": self.separator,
            "prompt_prefix": list(self.prompt_prefix),
            "list_separator": self.list_separator,
            "size": self.size,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Vocabulary":
        return cls(
            tuple(values["codebook_sizes"]),
            tuple(values["level_offsets"]),
            int(values["separator"]),
            tuple(values["prompt_prefix"]),
            int(values["list_separator"]),
            int(values["size"]),
        )
