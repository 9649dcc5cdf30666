"""Peer: `openvino-genai` with continuous batching, plain and with its prompt-lookup draft.

The checkpoint is exported once by optimum-intel in fp32, and keys, values and arithmetic are kept in fp32 too (its
defaults are smaller). Its generation config takes grammars of text and nothing of ours: it offers no function of the
tokens and no logits, so items, history and no-repeat cannot be kept.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from model.bench.peers.turns import (
    LOOKUP_NGRAM,
    LOOKUP_TOKENS,
    Decode,
    PeerRequest,
    Task,
    export_once,
    groups,
    take_turns,
)
from model.bench.peers.words import with_tokenizer

CACHE_GIB = 1


def prepare(task: Task) -> Decode:
    folder = export_once(Path(task.folder), lambda making: _export(Path(task.checkpoint), making))
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = task.batch
    # Whole prompts of a full batch fit one step, and the cache all of it: evicted while it speculates, a list grows too
    # long and the engine stops. Cached prefixes would be another repeat's work.
    scheduler.max_num_batched_tokens = task.batch * task.longest
    scheduler.cache_size = CACHE_GIB
    scheduler.enable_prefix_caching = False
    precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    properties = {"INFERENCE_NUM_THREADS": task.threads, **precision}
    if task.assisted:
        properties["prompt_lookup"] = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(folder / "model", scheduler, "CPU", properties)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = task.new_tokens, True, False
    if task.assisted:
        config.num_assistant_tokens, config.max_ngram_size = LOOKUP_TOKENS, LOOKUP_NGRAM

    def decode(requests: Sequence[PeerRequest]) -> list[list[int]]:
        tokens: list[list[int]] = []
        # A batch at a time: `max_num_seqs` does not hold back lists that are submitted together.
        for group in groups(requests, task.batch):
            prompts = [openvino.Tensor(np.array([r.prompt], dtype=np.int64)) for r in group]
            results = pipeline.generate(prompts, [config] * len(prompts))
            tokens += [list(map(int, result.m_generation_ids[0])) for result in results]
        return tokens

    return decode


def _export(checkpoint: Path, making: Path) -> None:
    source = with_tokenizer(checkpoint, making / "checkpoint")
    program = Path(sys.executable).with_name("optimum-cli")
    options = ["--task", "text-generation-with-past", "--weight-format", "fp32", str(making / "model")]
    # A process of its own: the exporter brings torch and its threads.
    subprocess.run(
        [str(program), "export", "openvino", "-m", str(source), *options], check=True, stdin=subprocess.DEVNULL
    )


if __name__ == "__main__":
    take_turns(prepare, "openvino-genai", "openvino", "optimum-intel")
