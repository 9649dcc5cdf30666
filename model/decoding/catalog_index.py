"""CatalogIndex: what decoding needs of one catalog version, built once and laid out as arrays in a folder.

A catalog of a million items takes many seconds to read and sort; a process that writes lists cannot spare them. So
another process builds the index and saves it, and this one maps the files into memory: nothing is parsed, copied or
executed. Knows catalogs and tries; nothing of models, queues or where catalogs come from.
"""

import json
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.catalog import Catalog
from model.decoding.beam_tree import BeamTables
from model.decoding.filters import Attributes, Categories, Numbers
from model.decoding.request import ListRequest
from model.item_trie import Availability, ItemTrie, legal_codes_by_search
from model.semantic_id import Codes, Vocabulary

NUM_POPULAR = 64
BEAM_FACTS = ("widest", "deciding", "whole")
BEAM_ARRAYS = tuple(field.name for field in fields(BeamTables) if field.name not in BEAM_FACTS)
NUM_CHECKED = 5  # nodes of every depth that `check` compares with a search over all items


class CatalogRefused(ValueError):
    """A catalog the target cannot speak of, or an index that is not what its catalog says; the message says why."""


@dataclass(frozen=True)
class CatalogIndex:
    """One catalog version, ready to decode with. `popular`: codes of some items, the most popular first."""

    version: str
    trie: ItemTrie
    beams: BeamTables
    attributes: Attributes
    popular: tuple[Codes, ...]

    @classmethod
    def build(cls, catalog: Catalog, version: str, vocabulary: Vocabulary) -> "CatalogIndex":
        """Blocking: seconds for a million items. Raises CatalogRefused where a code has no token."""
        sizes, most = catalog.codebook_sizes, vocabulary.codebook_sizes
        if len(sizes) != len(most) or any(n > m for n, m in zip(sizes, most, strict=True)):
            raise CatalogRefused(
                f"catalog {version} has codebooks of {list(sizes)} codes, the bundle's target knows {list(most)}: "
                "serve it with a bundle that was trained for it"
            )
        trie = ItemTrie(np.array([item.codes for item in catalog.items]), vocabulary)
        popular = sorted(catalog.items, key=lambda item: (-item.popularity, item.item_id))[:NUM_POPULAR]
        codes = tuple(item.codes for item in popular)
        return cls(version, trie, BeamTables.of(trie), Attributes.of(catalog, trie), codes)

    def check(self, catalog: Catalog) -> None:
        """Compare nodes of every depth with a search over all items. Raises CatalogRefused."""
        items, trie = [item.codes for item in catalog.items], self.trie
        if trie.num_items != len(items):
            raise CatalogRefused(f"the index of {self.version} has {trie.num_items} items, its catalog {len(items)}")
        one = torch.zeros(1, dtype=torch.int64)
        everything = Availability(trie.passing()[None], one, torch.full((1, 1), trie.num_items))
        draw, offsets = random.Random(0), trie.vocabulary.level_offsets
        for depth in range(trie.num_levels):
            for codes in draw.sample(items, min(NUM_CHECKED, len(items))):
                node = _node(trie, codes[:depth], everything)
                children = trie.children(torch.tensor([[node]]), everything)
                legal = trie.code[children.nodes[children.available > 0]].tolist()
                if sorted(legal) != legal_codes_by_search(items, codes[:depth], ()):
                    raise CatalogRefused(f"the index of {self.version} differs from its catalog at depth {depth}")
                leaf = trie.leaf(codes)
                tokens = [o + c for o, c in zip(offsets, codes, strict=True)]
                if leaf is None or trie.item_tokens[leaf, :-1].tolist() != tokens:
                    raise CatalogRefused(f"the index of {self.version} misses an item of its catalog")

    def golden_requests(self, count: int, max_history_items: int) -> list[ListRequest]:
        """Deterministic requests that try a decoder out: histories of popular items."""
        length = max(1, min(max_history_items, len(self.popular) // 4))
        histories = [self.popular[i::count][:length] or self.popular[:1] for i in range(count)]
        k = max(1, min(10, self.trie.num_items - length))
        return [ListRequest(f"golden-{i}", history, k, exclude_history=False) for i, history in enumerate(histories)]

    def save(self, folder: Path) -> None:
        """Write every array and one JSON document."""
        arrays, categories = self.trie.tables(), self.attributes.categories
        arrays |= {f"number-{i}": number.values for i, number in enumerate(self.attributes.numbers.values())}
        arrays |= {f"category-{i}": category.carriers for i, category in enumerate(categories.values())}
        arrays |= {f"beam-{name}": getattr(self.beams, name) for name in BEAM_ARRAYS}
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        document = {
            "version": self.version,
            "vocabulary": self.trie.vocabulary.as_dict(),
            "tables": list(self.trie.tables()),
            "numbers": list(self.attributes.numbers),
            "categories": {name: category.ends for name, category in categories.items()},
            "beams": {name: getattr(self.beams, name) for name in BEAM_FACTS},
            "popular": [list(codes) for codes in self.popular],
        }
        (folder / "index.json").write_text(json.dumps(document), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, vocabulary: Vocabulary, device: torch.device | str = "cpu") -> "CatalogIndex":
        """Map a saved index; the files may be removed afterwards. Raises CatalogRefused."""
        try:
            document = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if document["vocabulary"] != vocabulary.as_dict():
                raise CatalogRefused("the index was built for another bundle")
            trie = ItemTrie.of_tables({name: _map(folder, name) for name in document["tables"]}, vocabulary, device)
            numbers = {name: Numbers(_map(folder, f"number-{i}")) for i, name in enumerate(document["numbers"])}
            categories = {
                name: Categories(trie.num_items, ends, _map(folder, f"category-{i}"), ends.values())
                for i, (name, ends) in enumerate(document["categories"].items())
            }
            popular = tuple(tuple(codes) for codes in document["popular"])
            made: dict[str, Any] = {name: _map(folder, f"beam-{name}") for name in BEAM_ARRAYS}
            made |= {name: tuple(document["beams"][name]) for name in BEAM_FACTS}
            beams = BeamTables(**made)
            return cls(str(document["version"]), trie, beams, Attributes(numbers, categories), popular)
        except (OSError, KeyError, TypeError, AttributeError) as exc:
            raise CatalogRefused(f"the index cannot be read: {exc}") from exc


def _map(folder: Path, name: str) -> npt.NDArray[Any]:
    # Copy on write: torch warns of arrays that cannot be written to.
    array: npt.NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
    return array


def _node(trie: ItemTrie, prefix: Codes, everything: Availability) -> int:
    """The node of a prefix, stepped to through `children`."""
    node = 0
    for code in prefix:
        children = trie.children(torch.tensor([[node]]), everything).nodes[0, 0].tolist()
        node = next(child for child in children if int(trie.code[child]) == code)
    return node
