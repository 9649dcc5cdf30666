"""Peer: `onnxruntime-genai`, plain, with logits masked from Python, and with its n-gram draft.

The checkpoint is exported once by the package's own model builder in fp32. Its generator hands out the logits of each
step and takes them back changed, so a loop in Python can keep items, history and no-repeat at any batch size; grammars
(`set_guidance`) speak of text and know no history. Its n-gram draft takes batch 1 and offers no logits, so it cannot be
constrained. Shorter prompts padded on the left come out wrong (its attention sees the padding): batches are of equal
lengths.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from model.bench.peers.item_prefixes import ItemPrefixes
from model.bench.peers.turns import (
    LOOKUP_NGRAM,
    LOOKUP_TOKENS,
    Decode,
    PeerRequest,
    Task,
    equal_groups,
    export_once,
    take_turns,
)
from model.bench.peers.words import with_tokenizer


def prepare(task: Task) -> Decode:
    folder = export_once(Path(task.folder), lambda making: _export(Path(task.checkpoint), making))
    config = og.Config(str(folder / "model"))
    options = {"intra_op_num_threads": task.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    items = ItemPrefixes(task.items, task.separator)

    def decode(requests: Sequence[PeerRequest]) -> list[list[int]]:
        tokens: list[list[int]] = [[] for _ in requests]
        for indices in equal_groups(requests, task.batch):
            group = [requests[i] for i in indices]
            width = len(group[0].prompt)
            params = og.GeneratorParams(model)
            total = width + task.new_tokens
            # An end is as good as a token here: `min_length` keeps the list going.
            params.set_search_options(max_length=total, min_length=total, batch_size=len(group), do_sample=False)
            if task.assisted:
                params.set_speculative_options(ngram_size=LOOKUP_NGRAM, max_draft_tokens=LOOKUP_TOKENS)
            generator = og.Generator(model, params)
            generator.append_tokens(np.array([r.prompt for r in group], dtype=np.int32))
            if task.constrained:
                written = _constrained(generator, [items.excluding(r.banned) for r in group], task.new_tokens)
            else:
                while not generator.is_done():
                    generator.generate_next_token()
                written = [generator.get_sequence(i)[width:total].tolist() for i in range(len(group))]
            for index, row in zip(indices, written, strict=True):
                tokens[index] = row
        return tokens

    return decode


def _constrained(generator: Any, legal: Sequence[Any], new_tokens: int) -> list[list[int]]:
    """Let the generator choose among the legal tokens of each row only."""
    written: list[list[int]] = [[] for _ in legal]
    for _ in range(new_tokens):
        logits = generator.get_logits()
        masked = np.full_like(logits, -np.inf)
        for row, (may_follow, tokens) in enumerate(zip(legal, written, strict=True)):
            columns = may_follow(tokens)
            masked[row, -1, columns] = logits[row, -1, columns]
        generator.set_logits(masked)
        generator.generate_next_token()
        for tokens, token in zip(written, generator.get_next_tokens(), strict=True):
            tokens.append(int(token))
    return written


def _export(checkpoint: Path, making: Path) -> None:
    source = with_tokenizer(checkpoint, making / "checkpoint")
    command = ["-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(making / "model")]
    options = ["-p", "fp32", "-e", "cpu", "-c", str(making / "cache")]
    # A process of its own: the builder brings torch and its threads.
    subprocess.run([sys.executable, *command, *options], check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    take_turns(prepare, "onnxruntime-genai", "onnxruntime")
