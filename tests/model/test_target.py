import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from model.kv_cache import Sight, Write
from model.semantic_id import Vocabulary
from model.target import CheckpointError, Target

VOCABULARY = Vocabulary((5, 4, 3), (20, 30, 40), 9, (1, 2), 3, 50)
SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, head_dim=8),
    "llama-scaled-rope": LlamaConfig(
        **SHAPE,
        head_dim=8,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": MistralConfig(**SHAPE, head_dim=8, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen3-tied": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
}


def checkpoint(config: PretrainedConfig, folder: Path) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases start at 1 and 0: make them matter
            torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.3)
    model.save_pretrained(folder)
    return model


def item_tokens() -> torch.Tensor:
    offsets, sizes = VOCABULARY.level_offsets, VOCABULARY.codebook_sizes
    return torch.cat([torch.arange(o, o + n) for o, n in zip(offsets, sizes, strict=True)])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_equal_transformers_for_a_checkpoint_directory(name: str, tmp_path: Path) -> None:
    model = checkpoint(CONFIGS[name], tmp_path)
    target = Target.load(tmp_path, VOCABULARY)
    tokens = torch.randint(0, 50, (3, 17))
    expected = model(tokens).logits[..., item_tokens()]
    positions, rows = torch.arange(17).expand(3, -1), torch.arange(3)[:, None]
    cache = target.new_cache(3, 20)
    # Prefill of eleven tokens, then the rest under a mask over the cache.
    first = target(tokens[:, :11], positions[:, :11], cache, Write(rows, positions[:, :11]), Sight(None, None, 11))
    sight = Sight(torch.full((3,), 11), None, 17)
    rest = target(tokens[:, 11:], positions[:, 11:], cache, Write(rows, positions[:, 11:]), sight)
    logits = target.item_logits(torch.cat([first.hidden, rest.hidden], dim=1))
    assert torch.allclose(logits, expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_features_are_the_layers_outputs_as_transformers_names_them(tmp_path: Path) -> None:
    model = checkpoint(CONFIGS["llama"], tmp_path)
    target = Target.load(tmp_path, VOCABULARY)
    tokens, positions = torch.randint(0, 50, (1, 9)), torch.arange(9)[None]
    states = model(tokens, output_hidden_states=True).hidden_states
    at = Write(positions[:, :1], positions, 0, 0)
    output = target(tokens, positions, target.new_cache(1, 9), at, Sight(None, None, 9), (0, 2))
    assert torch.allclose(output.features[0], states[1], atol=1e-4)
    assert torch.allclose(output.features[1], states[3], atol=1e-4)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="gpt2"):
        Target.load(tmp_path, VOCABULARY)


def test_a_vocabulary_too_small_for_the_catalog_is_refused(tmp_path: Path) -> None:
    checkpoint(LlamaConfig(**(SHAPE | {"vocab_size": 40}), head_dim=8), tmp_path)
    with pytest.raises(CheckpointError, match="vocab_size"):
        Target.load(tmp_path, VOCABULARY)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = checkpoint(CONFIGS["llama"], tmp_path)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="finite"):
        Target(model, VOCABULARY)


def test_weights_of_another_shape_than_the_configuration_are_refused_by_name_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint(CONFIGS["llama"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(CheckpointError, match=r"mlp\.\w+\.weight is of shape .* config.json makes it") as caught:
        Target.load(tmp_path, VOCABULARY)
    assert "\n" not in str(caught.value)
    assert "MISMATCH" not in capfd.readouterr().err


def test_rows_longer_than_a_sliding_window_are_refused(tmp_path: Path) -> None:
    checkpoint(MistralConfig(**SHAPE, head_dim=8, sliding_window=32), tmp_path)
    target = Target.load(tmp_path, VOCABULARY)
    target.new_cache(1, 32)
    with pytest.raises(CheckpointError, match="sliding window"):
        target.new_cache(1, 33)
