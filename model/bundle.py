"""Bundle: the one folder serving needs, saved with a manifest of SHA-256 sums, loaded only when every sum holds.

    manifest.json  catalog.jsonl  target/  draft/  draft-plain/  report.json  README.md

Nothing in a bundle is executed: weights are safetensors, the rest JSON. Knows nothing of training or serving.
"""

import argparse
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from model.catalog import Catalog
from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_measure import measured_plan
from model.decoding.beam_plan import DRAFT_FREE
from model.decoding.beam_tree import BeamTree
from model.decoding.budget import measured_budget
from model.decoding.catalog_index import CatalogIndex
from model.decoding.filters import Attributes
from model.decoding.list_decoder import ListDecoder
from model.decoding.measurements import keep, kept, processor
from model.decoding.profile import Profile
from model.decoding.request import ListRequest
from model.decoding.strategies import Strategies, beams_of
from model.decoding.topology import Budget, FixedBudget
from model.draft.draft import Draft
from model.draft.network import DraftNetwork
from model.item_trie import ItemTrie
from model.semantic_id import Vocabulary
from model.target import Target

FORMAT = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED_SUFFIXES = (".json", ".jsonl", ".safetensors", ".md")


class BundleError(ValueError):
    """A bundle that must not be served; the message names the file and the reason."""


@dataclass(frozen=True)
class BundleInfo:
    """What a bundle says of itself."""

    name: str
    version: str
    catalog_version: str
    max_history_items: int
    report: dict[str, Any]


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle."""

    info: BundleInfo
    catalog: Catalog
    trie: ItemTrie
    target: Target
    draft: Draft | None
    plain_draft: Draft | None

    @cached_property
    def attributes(self) -> Attributes:
        """The catalog's, laid out for filters: once for all decoders."""
        return Attributes.of(self.catalog, self.trie)

    def list_decoder(
        self,
        *,
        num_rows: int,
        max_k: int,
        draft: Draft | None = None,
        catalog: CatalogIndex | None = None,
        **options: Any,
    ) -> ListDecoder:
        """A decoder over this bundle. Without `draft` the bundle's PAD-Rec draft is used; without a `budget` among
        `options` a chain of four is drafted until `warm_up` has measured better; with `catalog` it writes lists of
        another catalog version than the bundle's own."""
        options.setdefault("budget", FixedBudget(Budget(4)))
        return ListDecoder(
            self.target,
            draft or self.draft,
            catalog.trie if catalog else self.trie,
            catalog.attributes if catalog else self.attributes,
            num_rows=num_rows,
            max_history_items=self.info.max_history_items,
            max_k=max_k,
            **options,
        )

    def beam_decoder(
        self, *, num_rows: int, max_k: int, catalog: CatalogIndex | None = None, **options: Any
    ) -> BeamDecoder:
        """A beam decoder over this bundle. Without a `plan` among `options` whole sub-trees ride along where there is
        room until `warm_up` has measured better; without a `draft` the bundle's PAD-Rec draft may guess; `catalog` as
        for lists."""
        options.setdefault("plan", DRAFT_FREE)
        options.setdefault("draft", self.draft)
        return BeamDecoder(
            self.target,
            catalog.trie if catalog else self.trie,
            catalog.attributes if catalog else self.attributes,
            num_rows=num_rows,
            max_history_items=self.info.max_history_items,
            max_k=max_k,
            tree=BeamTree(catalog.trie, catalog.beams) if catalog else None,
            **options,
        )

    def strategies(
        self,
        *,
        num_rows: int,
        max_k: int,
        prefill_tokens: int | None = None,
        catalog: CatalogIndex | None = None,
        learned: Strategies | None = None,
    ) -> Strategies:
        """Both decoders, as a worker serves them. `learned`: those of another catalog version, whose measurements and
        acceptance they take over instead of being warmed up."""
        lists = self.list_decoder(num_rows=num_rows, max_k=max_k, catalog=catalog, prefill_tokens=prefill_tokens)
        beams = self.beam_decoder(num_rows=num_rows, max_k=max_k, catalog=catalog)
        if learned is not None:
            lists.budget = learned.lists.budget
            beams.plan = learned.beams.plan.over(beams.tree.deciding, beams.tree.whole)
        return Strategies(lists, beams)

    def golden_requests(self, count: int) -> list[ListRequest]:
        """Deterministic requests for warm-up: histories of popular items."""
        popular = sorted(self.catalog.items, key=lambda item: (-item.popularity, item.item_id))
        length = min(self.info.max_history_items, max(1, len(popular) // 4))
        histories = [popular[i::count][:length] or popular[:1] for i in range(count)]
        k = min(10, len(popular) - length)
        return [ListRequest(f"golden-{i}", tuple(item.codes for item in items), k) for i, items in enumerate(histories)]

    def warm_up(self, decoder: Strategies, measurements: Path | None = None) -> None:
        """Measure the budget of each load and what passes over beams cost, running every code path. On a CPU what
        `measurements` says of the same bundle, decoders and device is taken instead, and else what was found is left
        there; a GPU's graphs have to be captured anyway. Raises OSError where it cannot be left: all else is done."""
        golden, profile = self.golden_requests(min(8, len(self.catalog.items))), self.profile("draft")
        lists, beams = decoder.lists, decoder.beams
        if self.target.device.type != "cpu":
            measurements = None
        about = self._measured_here(decoder)
        known = kept(measurements, about, lists, beams, profile) if measurements else None
        found = known or (measured_budget(lists, golden, profile), measured_plan(beams, beams_of(golden)))
        lists.budget, beams.plan = found
        lists.freeze()
        if measurements is not None and known is None:
            keep(measurements, about, *found)

    def _measured_here(self, decoder: Strategies) -> dict[str, Any]:
        """What the numbers of a warm-up depend on, but for the code: a file does not outlive a release."""
        return {
            "version": self.info.version,
            "rows": len(decoder.lists.rows.held),
            "max_k": decoder.lists.max_k,
            "threads": torch.get_num_threads(),
            "dtype": str(self.target.dtype),
            "compiled": bool(self.target.native),
            "torch": str(torch.__version__),
            "machine": [platform.machine(), processor(), len(os.sched_getaffinity(0))],
        }

    def profile(self, draft: str) -> Profile:
        """What the report says of a draft (`draft` or `draft-plain`); a guess when it says nothing."""
        slots, known = self.trie.num_levels, self.info.report.get(draft, {}).get("profile")
        return Profile.guess(slots) if known is None else Profile.from_dict(known, slots)


def save_manifest(folder: Path, name: str, vocabulary: Vocabulary, max_history_items: int) -> dict[str, Any]:
    """Sum up every file in `folder` and write its manifest. The version is the hash of the sums."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    sums = json.dumps({name: entry["sha256"] for name, entry in files.items()}, sort_keys=True)
    manifest = {
        "format": FORMAT,
        "name": name,
        "version": hashlib.sha256(sums.encode()).hexdigest()[:12],
        "catalog_version": Catalog.load(folder / "catalog.jsonl").version,
        "max_history_items": max_history_items,
        "vocabulary": vocabulary.as_dict(),
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was checked against it. Raises BundleError."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise BundleError(f"manifest.json: format {manifest['format']!r} is not {FORMAT}")
        listed = {name: (str(entry["sha256"]), int(entry["bytes"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        if isinstance(exc, BundleError):
            raise
        raise BundleError(f"{folder.name}/manifest.json cannot be used: {exc}") from exc
    present = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    for name, path in present.items():
        if path.is_symlink():  # also to a folder: what it holds would be loaded without a sum
            raise BundleError(f"{name}: a bundle holds no symbolic links")
        if path.is_file() and name not in listed and name != "manifest.json":
            raise BundleError(f"{name}: not listed in the manifest")
    for name, (digest, size) in listed.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleError(f"manifest.json: {name} lies outside the bundle")
        if PurePosixPath(name).suffix not in ALLOWED_SUFFIXES:
            raise BundleError(f"{name}: only {', '.join(ALLOWED_SUFFIXES)} files may be in a bundle")
        path = present.get(name, folder)
        if not path.is_file() or path.stat().st_size != size or _sha256(path) != digest:
            raise BundleError(f"{name}: missing, truncated or changed since the manifest was written")
    return manifest


def load_bundle(folder: Path, *, dtype: str = "fp32", device: str = "cpu") -> Bundle:
    """Verify and load. Raises BundleError; nothing is loaded before every hash has been checked."""
    manifest = verify(folder)
    try:
        catalog = Catalog.load(folder / "catalog.jsonl")
        vocabulary = Vocabulary.from_dict(manifest["vocabulary"])
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise BundleError("report.json: must be an object")
        if catalog.version != manifest["catalog_version"] or catalog.codebook_sizes != vocabulary.codebook_sizes:
            raise BundleError("catalog.jsonl: not the catalog this bundle was trained for")
        trie = ItemTrie(np.array([item.codes for item in catalog.items]), vocabulary, device)
        target = Target.load(folder / "target", vocabulary, dtype=DTYPES[dtype], device=device)
        drafts = [_draft(folder / name, target) for name in ("draft", "draft-plain")]
        info = BundleInfo(
            str(manifest["name"]),
            str(manifest["version"]),
            catalog.version,
            int(manifest["max_history_items"]),
            report,
        )
        for name in ("draft", "draft-plain"):
            if "profile" in report.get(name, {}):
                Profile.from_dict(report[name]["profile"], trie.num_levels)
        if info.max_history_items < 1:
            raise BundleError("manifest.json: max_history_items must be positive")
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        OSError,
        AssertionError,
    ) as exc:
        if isinstance(exc, BundleError):
            raise
        raise BundleError(f"{folder.name}: {exc}") from exc
    except SafetensorError as exc:
        raise BundleError(f"{folder.name}: weights cannot be read: {exc}") from exc
    return Bundle(info, catalog, trie, target, *drafts)


def _draft(folder: Path, target: Target) -> Draft | None:
    if not folder.exists():
        return None
    network = DraftNetwork.load(folder)
    shape = network.shape
    if shape.hidden_size != target.hidden_size or max(shape.feature_layers) >= target.num_layers:
        raise BundleError(f"{folder.name}: does not fit the target's shape")
    if shape.num_slots != target.vocabulary.num_slots:
        raise BundleError(f"{folder.name}: has {shape.num_slots} slots, the vocabulary {target.vocabulary.num_slots}")
    if any(not bool(p.isfinite().all()) for p in network.parameters()):
        raise BundleError(f"{folder.name}: weights are not finite")
    return Draft(network, target.embedding, target.vocabulary)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """`padrec bundle FOLDER`: verify a bundle and print what it says of itself."""
    parser = argparse.ArgumentParser(prog="padrec bundle", description="Verify a bundle and print its manifest.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    try:
        manifest = verify(folder)
        load_bundle(folder)
    except BundleError as exc:
        print(f"padrec bundle: {exc}")  # noqa: T201 - a command's answer
        return 1
    print(json.dumps({k: v for k, v in manifest.items() if k != "files"}, indent=1))  # noqa: T201
    return 0
