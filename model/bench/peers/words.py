"""A copy of the checkpoint with a tokenizer of words `t0 t1 t2 ...`, for engines and exporters that insist on one.

All peers are given token IDs, so no text is ever read; token 0 is named as padding and end, because the exporters ask
for both and the lists never hold it. Runs inside the peers' own environments: standard library only.
"""

import json
import shutil
from pathlib import Path
from typing import Any


def with_tokenizer(checkpoint: Path, folder: Path) -> Path:
    """Copy the Hugging Face folder `checkpoint` to `folder` and add a tokenizer. Returns `folder`."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{token}": token for token in range(config["vocab_size"])},
            "unk_token": "t0",
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "t1",
        "eos_token": "t0",
        "pad_token": "t0",
        "unk_token": "t0",
        "model_max_length": config["max_position_embeddings"],
    }
    for name, value in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(value) + "\n", encoding="utf-8")
    return folder
