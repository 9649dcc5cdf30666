from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from model.bench.decode import held_out_requests
from model.bench.widened import widened, widened_model
from model.bundle import load_bundle
from model.decoding.offline import decode_all
from model.decoding.topology import Budget, FixedBudget

DATA = Path(__file__).parents[3] / ".data" / "ml-100k"
SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
CONFIGS = [LlamaConfig(**SHAPE), Qwen2Config(**SHAPE), Qwen3Config(**SHAPE, head_dim=16)]


@pytest.mark.parametrize("times", [2, 4])
def test_a_wider_bundle_writes_the_same_lists_by_the_same_guesses(debug_run: tuple[Path, Path], times: int) -> None:
    narrow = load_bundle(debug_run[1])
    wide = widened(narrow, debug_run[1], times)
    assert wide.target.hidden_size == times * narrow.target.hidden_size
    assert wide.target.num_heads == times * narrow.target.num_heads
    requests = held_out_requests(narrow, DATA, 5, users=4)
    for draft in ("draft", "plain_draft"):
        options = {"num_rows": 2, "max_k": 5, "budget": FixedBudget(Budget(3, 2))}
        decoders = [bundle.list_decoder(draft=getattr(bundle, draft), **options) for bundle in (narrow, wide)]
        results = [decode_all(decoder, requests).results for decoder in decoders]
        for request in requests:
            one, other = (found[request.request_id] for found in results)
            assert [item.codes for item in other.items] == [item.codes for item in one.items]
            assert [i.score for i in other.items] == pytest.approx([i.score for i in one.items], abs=1e-4)
            assert other.speculation == one.speculation


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_a_wider_checkpoint_of_any_kind_says_the_same(config: PretrainedConfig, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.3)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 40, (2, 9))
    with torch.inference_mode():
        said = model(tokens).logits
        torch.testing.assert_close(widened_model(tmp_path, 4)(tokens).logits, said, atol=1e-4, rtol=1e-4)
    assert float(said.std()) > 0.1
