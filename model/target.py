"""Target: a Hugging Face decoder-only checkpoint, run over a row KV cache with a sliced LM head.

Reads Llama, Mistral, Qwen2 and Qwen3 checkpoints through `transformers` and runs their layers with fused and packed
linear layers, because at the sizes served here the module calls of `transformers` cost as much as the arithmetic.
Knows nothing of tries, drafts or requests; `transformers` itself is the slow twin.

Shapes: B rows, n new tokens, T cached positions looked at, d hidden size, H query heads, G key/value heads,
s head size, S item tokens (all codes of all levels).
"""

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

from model.kv_cache import KVCache, Sight, TreeSight, Write
from model.layer import Layer, UnitNorm, fused_weights, grouped
from model.linear import PackedLinear
from model.native import kernel
from model.semantic_id import Vocabulary

Tensor = torch.Tensor
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names the reason."""


class TargetOutput(NamedTuple):
    """`hidden` [B, n, d] after the last norm; `features`: the outputs [B, n, d] of the layers asked for."""

    hidden: Tensor
    features: tuple[Tensor, ...]


class Target:
    """The LLM that decides."""

    def __init__(
        self, model: Any, vocabulary: Vocabulary, device: torch.device | str = "cpu", *, native: bool = True
    ) -> None:
        """Take the weights of a loaded `transformers` model. With `native` the compiled kernel runs the layers where
        it can. Raises CheckpointError."""
        config = model.config
        if config.model_type not in ARCHITECTURES:
            raise CheckpointError(f"architecture {config.model_type!r} is not one of {ARCHITECTURES}")
        if config.vocab_size < vocabulary.size:
            raise CheckpointError(f"vocab_size {config.vocab_size} is smaller than the catalog's {vocabulary.size}")
        if any(not bool(p.isfinite().all()) for p in model.parameters()):
            raise CheckpointError("the target's weights are not finite")
        model = model.to(device).eval()
        self.vocabulary, self.device, self.dtype = vocabulary, torch.device(device), model.dtype
        self.hidden_size, self.num_layers = config.hidden_size, config.num_hidden_layers
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.norm = UnitNorm(config.hidden_size, config.rms_norm_eps, device)
        self.window = _sliding_window(config)
        body = model.model
        with torch.no_grad():
            heads = (self.num_heads, self.num_kv_heads, self.head_size)
            weights = [fused_weights(source, *heads) for source in body.layers]
            self.embedding = body.embed_tokens.weight.detach()
            self.norm_scale = (body.norm.weight.detach().float() * self.norm.scale).to(self.dtype)
            tokens = torch.cat(
                [
                    torch.arange(o, o + n)
                    for o, n in zip(vocabulary.level_offsets, vocabulary.codebook_sizes, strict=True)
                ]
            )
            # In full precision whatever the layers' is: half of it would make ties of near-ties.
            head = model.lm_head.weight[tokens.to(device)].float()
            self.head: PackedLinear | kernel.NativeLinear
            self.layers: list[Layer] = []
            self.native: kernel.NativeTarget | None = None
            if native and kernel.fits(self.hidden_size, self.head_size, self.dtype, self.device):
                floors = (float(self.norm.floor), math.sqrt(self.head_size * config.rms_norm_eps))
                self.native = kernel.NativeTarget(weights, self.embedding, self.norm_scale, heads, floors)
                self.head = kernel.NativeLinear(head)
            else:
                self.layers = [Layer(layer, *heads, config.rms_norm_eps) for layer in weights]
                self.head = PackedLinear(head)
            self._rotary = body.rotary_emb
        sizes = [0, *vocabulary.codebook_sizes]
        self.num_item_tokens = sum(vocabulary.codebook_sizes)
        self.head_columns = torch.tensor(sizes[:-1], device=device).cumsum(0)
        self.rotations = self._rotation_table(1024)

    @classmethod
    def load(
        cls, folder: Path, vocabulary: Vocabulary, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> "Target":
        """Read a checkpoint directory (safetensors only, no code is executed). Raises CheckpointError."""
        try:
            model, loading = read_checkpoint(folder, dtype)
        except (OSError, ValueError, KeyError) as exc:
            raise CheckpointError(f"{folder.name}: {exc}") from exc
        if loading["mismatched_keys"]:
            name, found, wanted = sorted(loading["mismatched_keys"])[0]
            raise CheckpointError(
                f"{folder.name}: {name} is of shape {tuple(found)}, config.json makes it {tuple(wanted)}"
            )
        if loading["missing_keys"]:  # `transformers` would serve random weights for them
            raise CheckpointError(f"{folder.name}: the checkpoint lacks {sorted(loading['missing_keys'])[0]}")
        return cls(model, vocabulary, device)

    def new_cache(self, num_rows: int, num_positions: int) -> KVCache:
        """Raises CheckpointError when the rows would be longer than a sliding attention window."""
        if self.window is not None and num_positions > self.window:
            raise CheckpointError(f"rows of {num_positions} tokens exceed the sliding window of {self.window}")
        dtype = self.dtype if self.native is None else torch.float32
        return KVCache(self.num_layers, num_rows, num_positions, self.num_kv_heads, self.head_size, self.device, dtype)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        at: Write,
        sight: Sight | TreeSight,
        features: Sequence[int] = (),
        wanted: Tensor | None = None,
    ) -> TargetOutput:
        """One pass over `tokens` [B, n] at rotary `positions` [B, n], stored `at`, seeing what `sight` says.
        `features` names layers whose outputs are wanted, ascending (the last layer's is replaced by the normalised
        hidden state); of one token a row, `wanted` [B], the hidden state [B, 1, d] (None: of all, [B, n, d])."""
        if self.native is not None:
            places, asked = kernel.Places.of(at, sight, positions), None
            if wanted is not None and self.num_layers - 1 not in features:
                asked = at.among(wanted)
            out, outputs = self.native(at.compact(tokens), places, cache.data, self.rotations, features, asked)
            padded = tuple(at.padded(output) for output in outputs)
            return TargetOutput(_of(at.padded(out), wanted) if asked is None else out.unsqueeze(1), padded)
        mask = grouped(sight.mask(at, self.dtype), self.num_heads, self.num_kv_heads)
        x = self.embedding[at.compact(tokens)]
        rotation = self.rotations[at.compact(positions)].unsqueeze(1)
        kept: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, cache, index, at, sight.reach)
            if index in features:
                kept.append(at.padded(x))
        hidden = at.padded(self.norm(x) * self.norm_scale)
        if self.num_layers - 1 in features:
            kept[-1] = hidden
        return TargetOutput(_of(hidden, wanted), tuple(kept))

    def item_logits(self, hidden: Tensor) -> Tensor:
        """[..., S] float32 logits of the item tokens only, level after level (see `head_columns`)."""
        return self.head(hidden.flatten(0, -2).float()).view(*hidden.shape[:-1], -1)

    def reserve_positions(self, count: int) -> None:
        """Make room for positions below `count`; not during serving."""
        if count > len(self.rotations):
            self.rotations = self._rotation_table(count)

    def _rotation_table(self, count: int) -> Tensor:
        """[count, s/2] complex: cos + i sin with the checkpoint's own (possibly scaled) frequencies."""
        positions = torch.arange(count, device=self.device)[None]
        cos, sin = self._rotary(torch.zeros(1, dtype=torch.float32, device=self.device), positions)
        half = self.head_size // 2
        return torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())


def read_checkpoint(folder: Path, dtype: torch.dtype) -> Any:
    """The model, and what `transformers` has to say of reading it."""
    with _quiet():
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """`transformers` without its bars, which would stand between the lines of a log, and without its reports: what is
    wrong is refused in one line."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _of(hidden: Tensor, wanted: Tensor | None) -> Tensor:
    """`hidden` [B, n, d], or of one token a row, [B, 1, d]."""
    if wanted is None:
        return hidden
    return hidden.gather(1, wanted.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1]))


def preload() -> None:
    """Do what the first reading of a checkpoint does, imports and `transformers`' own tables: a second or two that a
    process may spend before it is needed."""
    for name in ARCHITECTURES:
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    with TemporaryDirectory() as folder:
        shape = LlamaConfig(vocab_size=8, num_attention_heads=1, **sizes)
        tiny: Any = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
        with _quiet():
            tiny.save_pretrained(folder)
        read_checkpoint(Path(folder), torch.float32)


def _sliding_window(config: Any) -> int | None:
    if not getattr(config, "use_sliding_window", True):
        return None
    window = getattr(config, "sliding_window", None)
    return None if window is None or window == math.inf else int(window)
