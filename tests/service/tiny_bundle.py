"""A bundle a test can serve: random weights, a hundred items, milliseconds to write and to load."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.bundle import save_manifest
from model.draft.network import DraftNetwork, DraftShape
from model.semantic_id import Vocabulary
from tests.model.conftest import SIZES, random_catalog

MAX_HISTORY_ITEMS = 6
HELD_OUT_USER = "7"


def write_bundle(folder: Path) -> Path:
    """Write the bundle into `folder`, which must not exist, and return it."""
    torch.manual_seed(0)
    folder.mkdir()
    vocabulary = Vocabulary.compact(SIZES)
    random_catalog(0).save(folder / "catalog.jsonl")
    shape = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "target")
    DraftNetwork(DraftShape(32, 4, 48, vocabulary.num_slots, 4, (0, 1, 2), True, "gated")).save(folder / "draft")
    (folder / "report.json").write_text(json.dumps({"held_out_users": [HELD_OUT_USER]}))
    (folder / "README.md").write_text("# A tiny bundle\n")
    save_manifest(folder, "tiny", vocabulary, MAX_HISTORY_ITEMS)
    return folder


def item_ids(bundle: Path) -> list[str]:
    """Every item of a bundle's catalog."""
    lines = (bundle / "catalog.jsonl").read_text().splitlines()[1:]
    return [json.loads(line)["item_id"] for line in lines]


def write_data(folder: Path, items: list[str]) -> Path:
    """MovieLens files of two users; the held-out one saw all items, in reverse order of the file."""
    folder.mkdir()
    rows = [f"{HELD_OUT_USER}\t{item}\t4\t{1000 - n}" for n, item in enumerate(items)]
    rows += [f"8\t{item}\t3\t500" for item in items[:3]]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "ml-100k.inter").write_text("\n".join([header, *rows]) + "\n")
    titles = [f"{item}\tFilm {item}\t{'' if n == 0 else 1990}\tComedy" for n, item in enumerate(items)]
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    (folder / "ml-100k.item").write_text("\n".join([header, *titles]) + "\n")
    return folder
