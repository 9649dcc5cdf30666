"""Trains the target: next-token prediction over whole histories with a `transformers` causal language model.

Knows histories and codes; nothing of decoding or drafts.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from model.config import TargetConfig
from model.data.batches import TokenBatch, by_length, held_out_windows, token_batch, training_windows
from model.data.histories import Split
from model.semantic_id import Codes, Vocabulary
from model.train.fit import FitResult, fit

ARCHITECTURES = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def new_target(config: TargetConfig, vocabulary: Vocabulary) -> PreTrainedModel:
    """An untrained target of the configured shape. Raises ValueError for an unknown architecture."""
    if config.architecture not in ARCHITECTURES:
        raise ValueError(f"target.architecture must be one of {sorted(ARCHITECTURES)}")
    torch.manual_seed(config.seed)
    shape = ARCHITECTURES[config.architecture](
        vocab_size=vocabulary.size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.hidden_size // config.num_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
    return model


def train_target(
    split: Split, codes: Mapping[str, Codes], vocabulary: Vocabulary, config: TargetConfig, folder: Path
) -> tuple[PreTrainedModel, FitResult]:
    """Train on the training users, stop early on the validation users; the best weights are returned in eval mode."""
    model = new_target(config, vocabulary)

    size = config.batch_size

    # Labels are dense: batches are made when they are used.
    def batch(windows: Sequence[Sequence[str]], known: Sequence[int] = ()) -> TokenBatch:
        return token_batch(windows, codes, vocabulary, config.soon_items, config.soon_decay, known)

    def chunks(epoch: int) -> list[list[list[str]]]:
        rng = random.Random(config.seed * 1000 + epoch)
        windows = training_windows(split.train, config.window_items, config.item_dropout, rng)
        if config.length_pool:
            windows = by_length(windows, size, config.length_pool, rng)
        return [windows[begin : begin + size] for begin in range(0, len(windows), size)]

    asked, known = held_out_windows(split.validation, config.window_items)

    def validate() -> float:
        total = count = 0.0
        for begin in range(0, len(asked), size):
            held_out = batch(asked[begin : begin + size], known[begin : begin + size])
            questions = float(held_out.labels.sum())
            total += token_loss(model, held_out).item() * questions
            count += questions
        return total / count

    result = fit(
        model,
        chunks,
        lambda windows: token_loss(model, batch(windows)),
        validate,
        config,
        folder,
        label="target",
        patience=config.patience,
    )
    model.eval()  # type: ignore[no-untyped-call]
    return model, result


def token_loss(model: PreTrainedModel, batch: TokenBatch) -> torch.Tensor:
    """Mean cross-entropy in nats against the labels. Rows are padded on the right: causality hides the padding."""
    hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    asked = hidden.gather(1, batch.asked.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    log_probs = torch.log_softmax(model.lm_head(asked).float(), dim=-1)
    return -(batch.labels * log_probs).sum() / batch.labels.sum()
