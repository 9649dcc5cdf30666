from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from model.bench.peers.words import with_tokenizer


def test_a_copy_has_a_tokenizer_whose_words_are_the_token_ids(tmp_path: Path) -> None:
    shape = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "target")
    before = (tmp_path / "target" / "config.json").read_bytes()
    copy = with_tokenizer(tmp_path / "target", tmp_path / "copy")
    assert Tokenizer.from_file(str(copy / "tokenizer.json")).encode("t10 t3 t3 t1").ids == [10, 3, 3, 1]
    tokenizer = AutoTokenizer.from_pretrained(copy)
    assert len(tokenizer) == 11
    model = AutoModelForCausalLM.from_pretrained(copy)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    assert (tmp_path / "target" / "config.json").read_bytes() == before
