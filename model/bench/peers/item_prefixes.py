"""ItemPrefixes: which token may come next in a list of items, for peers that take a function of the tokens so far.

The obvious dictionary of prefixes, as one writes it beside an engine that knows no items: it counts the items below
each prefix, less those banned, less those listed already. The slow twin is `model.item_trie.legal_codes_by_search`.
Runs inside the peers' own environments: standard library only.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

Legal = Callable[[Sequence[int]], list[int]]


class ItemPrefixes:
    """Every prefix of every item, with its next tokens and how many items begin with it."""

    def __init__(self, items: Sequence[Sequence[int]], separator: int) -> None:
        """`items`: the tokens of each item, distinct, of equal length, without the separator."""
        self.length, self.separator = len(items[0]), separator
        self.count = _below(items)
        following: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for prefix in self.count:
            following[prefix[:-1]].add(prefix[-1])
        self.following = {prefix: sorted(tokens) for prefix, tokens in following.items()}

    def excluding(self, banned: Iterable[Sequence[int]]) -> Legal:
        """A function from the tokens written so far to the tokens that may follow, ascending, never none: after
        tokens that begin no item (a draft's wrong guess) it is the separator, so that the caller can go on."""
        gone = _below(banned)

        def legal(written: Sequence[int]) -> list[int]:
            place = len(written) % (self.length + 1)
            if place == self.length:
                return [self.separator]
            start = len(written) - place
            listed = _below(written[i : i + self.length] for i in range(0, start, self.length + 1))
            prefix = tuple(written[start:])
            ends = ((token, (*prefix, token)) for token in self.following.get(prefix, ()))
            return [t for t, end in ends if self.count[end] > gone[end] + listed[end]] or [self.separator]

        return legal


def _below(items: Iterable[Sequence[int]]) -> Counter[tuple[int, ...]]:
    """Items below each prefix, the whole item included and the empty prefix not."""
    return Counter(tuple(item[:n]) for item in items for n in range(1, len(item) + 1))
