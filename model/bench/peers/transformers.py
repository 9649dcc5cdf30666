"""Peer: `transformers` generate, plain, with a prefix function, and assisted.

`prefix_allowed_tokens_fn` is a function of one row's tokens, so it can keep items, history and no-repeat, at any
batch size. Assisted generation takes batch 1 only; its draft here is prompt lookup (n-grams of the row itself): the
target has no smaller sister with its vocabulary, and a lookup costs no pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from model.bench.peers.item_prefixes import ItemPrefixes
from model.bench.peers.turns import LOOKUP_NGRAM, LOOKUP_TOKENS, Decode, PeerRequest, Task, groups, take_turns

PADDING = 0


def prepare(task: Task) -> Decode:
    torch.set_num_threads(task.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype=torch.float32, local_files_only=True)
    model.eval()
    items = ItemPrefixes(task.items, task.separator)

    def decode(requests: Sequence[PeerRequest]) -> list[list[int]]:
        tokens: list[list[int]] = []
        for group in groups(requests, task.batch):
            width = max(len(r.prompt) for r in group)
            prompts = [[PADDING] * (width - len(r.prompt)) + list(r.prompt) for r in group]
            real = [[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in group]
            options: dict[str, Any] = {}
            if task.constrained:
                legal = [items.excluding(r.banned) for r in group]
                options["prefix_allowed_tokens_fn"] = _rows(legal, width)
                options["renormalize_logits"] = True
            if task.assisted:
                options |= {"prompt_lookup_num_tokens": LOOKUP_TOKENS, "max_matching_ngram_size": LOOKUP_NGRAM}
            written = model.generate(
                torch.tensor(prompts),
                attention_mask=torch.tensor(real),
                max_new_tokens=task.new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=PADDING,
                **options,
            )
            tokens += written[:, width:].tolist()
        return tokens

    return decode


def _rows(legal: Sequence[Any], width: int) -> Any:
    """`prefix_allowed_tokens_fn(row, tokens)`: `tokens` are padding, prompt and what was written since `width`."""
    return lambda row, tokens: legal[row](tokens[width:].tolist())


if __name__ == "__main__":
    take_turns(prepare, "transformers", "torch")
