"""Trains the target: next-token prediction over whole histories with a `transformers` causal language model.

Knows histories and codes; nothing of decoding or drafts.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from model.config import TargetConfig
from model.data.batches import TokenBatch, token_batches, training_windows
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

    def as_batches(windows: Sequence[Sequence[str]]) -> list[TokenBatch]:
        return list(token_batches(windows, codes, vocabulary, config.batch_size, config.soon_items, config.soon_decay))

    def batches(epoch: int) -> list[TokenBatch]:
        rng = random.Random(config.seed * 1000 + epoch)
        return as_batches(training_windows(split.train, config.window_items, config.item_dropout, rng))

    validation = as_batches(training_windows(split.validation, config.window_items, 0.0, random.Random(0)))

    def validate() -> float:
        counts = [float(b.labels.sum()) for b in validation]
        return sum(token_loss(model, b).item() * n for b, n in zip(validation, counts, strict=True)) / sum(counts)

    result = fit(
        model,
        batches,
        lambda b: token_loss(model, b),
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
