"""Binds kernel.cpp: packs a target's weights for it and runs passes over a row KV cache.

The compiled library is chosen by what the processor can do; where there is none (another processor, no compiler at
installation) `load` says so and the layers in `model.layer` run, which are also the twin it is tested against.
Knows pointers and shapes; nothing of tries or requests.

Shapes: N tokens of a pass, d hidden size, H query heads, G key/value heads, s head size, f feed-forward size.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.kv_cache import Sight, TreeSight, Write
from model.layer import LayerWeights

Tensor = torch.Tensor
PANEL = 64
VARIANTS = {"AVX512": "v4", "AVX2": "v3"}  # what torch calls the processor -> the x86-64 level compiled for
HEAD_SIZES = (*range(16, 129, 16), 192, 256)  # what kernel.cpp's attention is compiled for
_pointer, _number = ctypes.c_void_p, ctypes.c_int64


class Places(NamedTuple):
    """How `kernel.cpp` is told of a Write and a Sight. Where the N tokens of a pass lie, each [N] int64: cache `row`,
    position stored `at`, rotary `position`. A token sees positions 0..committed-1 of its row, and committed + seen[i]
    for the first `seeing` entries of its line of `seen` [N or 1, m] int32 (one line: shared by all)."""

    row: Tensor
    at: Tensor
    position: Tensor
    committed: Tensor
    seeing: Tensor
    seen: Tensor

    @classmethod
    def asked(cls, at: Write, positions: Tensor, wanted: torch.Size, sight: Sight) -> "Places":
        """For a pass that asks only `wanted` [B, W] of its tokens: what they see, among what `own` [B, W, m] allows."""
        shape, own = at.positions.shape, sight.own
        committed = at.rows.new_zeros(wanted) if sight.committed is None else sight.committed[:, None].expand(wanted)
        seeing, seen = at.rows.new_zeros(wanted), torch.empty(1, 0, dtype=torch.int32)
        if own is not None:
            seeing, seen = _lines(own)
        row = at.rows.expand(shape).flatten()
        stored, position = at.positions.flatten(), positions.flatten()
        return cls(row, stored, position, committed.flatten(), seeing.flatten(), seen.flatten(0, -2))

    @classmethod
    def of(cls, at: Write, sight: Sight | TreeSight, positions: Tensor) -> "Places":
        """`positions` [B, n] are the rotary ones."""
        rows, new = at.positions.shape
        shape = (rows, new)
        if isinstance(sight, TreeSight):
            told = (at.rows.expand(shape), at.positions, positions, sight.committed, (sight.paths >= 0).sum(-1))
            return cls(*(at.compact(part) for part in (*told, sight.paths.int())))
        committed = at.rows.new_zeros(shape) if sight.committed is None else sight.committed[:, None].expand(shape)
        if sight.own is None:
            seeing, seen = torch.arange(1, new + 1).expand(shape), torch.arange(new, dtype=torch.int32)[None]
        else:
            seeing, seen = _lines(sight.own)
            seen = at.compact(seen)
        row, stored, position = (at.compact(part) for part in (at.rows.expand(shape), at.positions, positions))
        return cls(row, stored, position, at.compact(committed), at.compact(seeing), seen)


class _Layer(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in LayerWeights._fields]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("vocabulary", "layers", "size", "heads", "kv_heads", "head_size", "feed")),
        ("paired", _number),
        *((name, ctypes.c_float) for name in ("norm_floor", "head_floor")),
        *((name, _pointer) for name in ("layer", "embedding", "norm_scale")),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("tokens", "rows", "positions", "turns", "extra", "stride", "num_features")),
        ("asking", _number),
        *((name, _pointer) for name in ("token", "row", "at", "position", "committed", "seeing", "feature_layers")),
        ("asked", _pointer),
        *((name, _pointer) for name in ("seen", "rotations", "cache", "hidden", "features")),
    ]


class _Draft(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("vocabulary", "size", "heads", "head_size", "feed", "paired")),
        ("norm_floor", ctypes.c_float),
        *((name, _pointer) for name in ("token_part", "feature_part", "qkv", "output", "gate_up", "down")),
        ("last_scale", _pointer),
    ]


class _Reading(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("tokens", "asking", "rows", "positions", "turns", "extra", "stride")),
        *((name, _pointer) for name in ("token", "row", "at", "position", "asked", "committed", "seeing")),
        *((name, _pointer) for name in ("seen", "features", "rotations", "step", "context")),
        ("gate", ctypes.c_float),
        *((name, _pointer) for name in ("cache", "out")),
    ]


@cache
def load() -> Any | None:
    """The library compiled for this processor, or None."""
    level = VARIANTS.get(torch.backends.cpu.get_cpu_capability())
    return None if level is None else opened(level)


def opened(level: str) -> Any | None:
    """The library compiled for an x86-64 level, or None."""
    found = sorted(Path(__file__).parent.glob(f"_kernel_{level}*.so"))
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    library.padrec_pass.argtypes = [_pointer, _pointer, ctypes.c_int]
    library.padrec_read.argtypes = [_pointer, _pointer, ctypes.c_int]
    library.padrec_round.argtypes = [_pointer] * 8 + [ctypes.c_int]
    library.padrec_prompts.argtypes = [_pointer] * 9 + [ctypes.c_int]
    library.padrec_beams.argtypes = [_pointer] * 6 + [ctypes.c_int]
    library.padrec_search.argtypes = [_pointer] * 7 + [ctypes.c_int]
    library.padrec_linear.argtypes = [_pointer] * 4 + [_number] * 4 + [ctypes.c_int]
    return library


def fits(size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel is there and can run a model of such weights."""
    whole = size % 16 == 0 and head_size in HEAD_SIZES
    return whole and dtype in (torch.float32, torch.bfloat16) and device.type == "cpu" and load() is not None


def pack(weight: Tensor) -> Tensor:
    """[out, in] to panels [ceil(out / PANEL), in, PANEL], zeros behind the last row; of bf16 in / 2 (rounded up) by
    PANEL by 2."""
    return _columns(_padded(weight, PANEL).view(-1, PANEL, weight.shape[1]))


def pack_gated(gate_up: Tensor) -> Tensor:
    """[2 f, in] to panels, as `pack` does, of PANEL / 2 gates and the PANEL / 2 values they act on."""
    half, columns = PANEL // 2, gate_up.shape[1]
    return _columns(torch.cat([_padded(part, half).view(-1, half, columns) for part in gate_up.chunk(2)], dim=1))


class NativeLinear:
    """`x @ weight.T (+ bias)` whose rows do not depend on their company, to the last bit. By a bf16 `weight` x is
    rounded to bf16, too; sums and answers are fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight.detach()
        self.out, self.columns = weight.shape
        self.packed = pack(self.weight)
        self.bias = None if bias is None else _padded(bias.float(), PANEL)

    def __call__(self, x: Tensor) -> Tensor:
        """x [m, in] float32."""
        library, x = load(), x.contiguous()
        assert library is not None
        out = torch.empty(x.shape[0], self.out)
        bias = None if self.bias is None else self.bias.data_ptr()
        sizes = (x.shape[0], self.columns, self.out, int(self.weight.dtype == torch.bfloat16))
        tensors = (x.data_ptr(), self.packed.data_ptr(), bias, out.data_ptr())
        library.padrec_linear(*tensors, *sizes, torch.get_num_threads())
        return out


class NativeTarget:
    """The layers of a target, and its last norm. Where the weights are bf16, a matrix and what it is multiplied by are
    bf16; sums, norms, attention and the cache are fp32."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        embedding: Tensor,
        norm_scale: Tensor,
        heads: tuple[int, int, int],
        floors: tuple[float, float],
    ) -> None:
        """`heads`: H, G, s; `floors`: the epsilons of the norms over d and over s (see `model.layer.UnitNorm`)."""
        self.size = embedding.shape[1]
        self._kept: list[Tensor] = [embedding.contiguous(), norm_scale.float().contiguous()]
        packed = (_Layer * len(layers))(*(self._packed(layer) for layer in layers))
        self._layers = packed
        feed = layers[0].down.shape[1]
        self._model = _Model(
            len(embedding),
            len(layers),
            self.size,
            *heads,
            feed,
            int(layers[0].qkv.dtype == torch.bfloat16),
            *floors,
            ctypes.addressof(packed),
            self._kept[0].data_ptr(),
            self._kept[1].data_ptr(),
        )

    def __call__(
        self,
        tokens: Tensor,
        places: Places,
        cache: Tensor,
        rotations: Tensor,
        features: Sequence[int],
        asked: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """`tokens` [N]; `cache` [layers, 2, R, G, T, s]; `rotations` complex [positions, s/2]. Returns the hidden
        states [N, d] after the last norm, or [A, d] of the tokens `asked` [A] alone (ascending; not where the last
        layer is among the features), and the outputs [N, d] of the layers `features`."""
        library = load()
        assert library is not None
        rows, positions = cache.shape[2], cache.shape[4]
        count, extra, threads = len(tokens), places.seen.shape[1], torch.get_num_threads()
        held = [tokens.long().contiguous(), *_ready(places)]
        asking = count if asked is None else len(asked)
        outputs = torch.empty(1 + len(features), count, self.size)
        layers = (_number * len(features))(*features)
        into = (_pointer * len(features))(*(output.data_ptr() for output in outputs[1:]))
        one = _Pass(
            count,
            rows,
            positions,
            len(rotations),
            extra,
            extra if len(places.seen) > 1 else 0,
            len(features),
            asking,
            *(tensor.data_ptr() for tensor in held[:6]),
            ctypes.addressof(layers),
            None if asked is None else asked.data_ptr(),
            held[6].data_ptr(),
            rotations.data_ptr(),
            cache.data_ptr(),
            outputs.data_ptr(),
            ctypes.addressof(into),
        )
        if library.padrec_pass(ctypes.byref(self._model), ctypes.byref(one), threads):
            raise IndexError("a token, row or position lies outside the model or its cache")
        return outputs[0, :asking], list(outputs[1:])

    @property
    def pointer(self) -> Any:
        """The target as the compiled functions take it; alive as long as this object is."""
        return ctypes.byref(self._model)

    def _packed(self, layer: LayerWeights) -> _Layer:
        tensors = LayerWeights(
            pack(layer.qkv),
            None if layer.qkv_bias is None else _padded(layer.qkv_bias.float(), PANEL),
            None if layer.qk_scale is None else layer.qk_scale.float().contiguous(),
            pack(layer.output),
            None if layer.output_bias is None else _padded(layer.output_bias.float(), PANEL),
            pack_gated(layer.gate_up),
            pack(layer.down),
        )
        self._kept += [tensor for tensor in tensors if tensor is not None]
        return _Layer(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


class DraftWeights(NamedTuple):
    """A draft's layer, norm scales folded in (see `model.draft.draft`): `token_part` [V, d], `feature_part` [d, d],
    `qkv` [3 H s, d], `output` [d, H s], `gate_up` [2 f, d], `down` [d, f], `last_scale` [d]."""

    token_part: Tensor
    feature_part: Tensor
    qkv: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor
    last_scale: Tensor


class StepTerm(NamedTuple):
    """What a draft step adds to every input: its `embedding` [d], times sigmoid(context . input + constant); without
    a `context` [d], times 1."""

    embedding: Tensor
    context: Tensor | None
    constant: float


def step_arrays(terms: Sequence[StepTerm | None], steps: int) -> tuple[Any, Any, Any]:
    """What `steps` draft steps add, as the compiled functions take it: embeddings, contexts and constants, one a step.
    After the last of the `terms` that one is repeated; without any, nothing is added."""
    of = [terms[min(step, len(terms) - 1)] if terms else None for step in range(steps)]
    embeddings = (None if term is None else term.embedding.data_ptr() for term in of)
    contexts = (None if term is None or term.context is None else term.context.data_ptr() for term in of)
    gates = (0.0 if term is None else term.constant for term in of)
    return (_pointer * steps)(*embeddings), (_pointer * steps)(*contexts), (ctypes.c_float * steps)(*gates)


class NativeDraft:
    """A draft's layer over a row KV cache of one layer."""

    def __init__(
        self, weights: DraftWeights, heads: int, head_size: int, floor: float, dtype: torch.dtype = torch.float32
    ) -> None:
        """`dtype`: of the matrices."""
        self.size = weights.down.shape[0]
        self._kept = DraftWeights(
            token_part=weights.token_part.contiguous(),
            feature_part=pack(weights.feature_part.to(dtype)),
            qkv=pack(weights.qkv.to(dtype)),
            output=pack(weights.output.to(dtype)),
            gate_up=pack_gated(weights.gate_up.to(dtype)),
            down=pack(weights.down.to(dtype)),
            last_scale=weights.last_scale.contiguous(),
        )
        paired = int(dtype == torch.bfloat16)
        sizes = (len(weights.token_part), self.size, heads, head_size, weights.down.shape[1], paired)
        self._model = _Draft(*sizes, floor, *(tensor.data_ptr() for tensor in self._kept))

    @property
    def pointer(self) -> Any:
        """The draft as the compiled functions take it; alive as long as this object is."""
        return ctypes.byref(self._model)

    def __call__(
        self,
        tokens: Tensor,
        features: Tensor,
        places: Places,
        asked: Tensor,
        step: StepTerm | None,
        cache: Tensor,
        rotations: Tensor,
    ) -> Tensor:
        """Read `tokens` [N] with `features` [N, d]; outputs [A, d] of those `asked` [A]. `committed`, `seeing` and
        `seen` of `places` are those of the asked tokens, the rest is all tokens'."""
        library = load()
        assert library is not None
        count, asking, threads = len(tokens), len(asked), torch.get_num_threads()
        rows, positions, extra = cache.shape[2], cache.shape[4], places.seen.shape[1]
        row, at, position, committed, seeing, seen = _ready(places)
        held = (tokens.long().contiguous(), row, at, position, asked.contiguous(), committed, seeing, seen)
        features, out = features.contiguous(), torch.empty(asking, self.size)
        one = _Reading(
            count,
            asking,
            rows,
            positions,
            len(rotations),
            extra,
            extra if len(seen) > 1 else 0,
            *(tensor.data_ptr() for tensor in held),
            features.data_ptr(),
            rotations.data_ptr(),
            None if step is None else step.embedding.data_ptr(),
            None if step is None or step.context is None else step.context.data_ptr(),
            0.0 if step is None else step.constant,
            cache.data_ptr(),
            out.data_ptr(),
        )
        if library.padrec_read(ctypes.byref(self._model), ctypes.byref(one), threads):
            raise IndexError("a token, row or position lies outside the model or its cache")
        return out


def _ready(places: Places) -> list[Tensor]:
    """As the kernel reads them: nothing there knows of types or strides."""
    return [*(tensor.long().contiguous() for tensor in places[:-1]), places.seen.int().contiguous()]


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """`rows` with zeros behind them up to a multiple."""
    padded = rows.new_zeros(-(-len(rows) // multiple) * multiple, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


def _columns(panels: Tensor) -> Tensor:
    """Panels [p, PANEL, in] as the kernel reads them: input by input, of bf16 two by two."""
    if panels.dtype == torch.bfloat16:
        panels = torch.nn.functional.pad(panels, (0, panels.shape[2] % 2)).unflatten(2, (-1, 2))
    return panels.transpose(1, 2).contiguous()


def _lines(own: Tensor) -> tuple[Tensor, Tensor]:
    """`seeing` and `seen` of tokens that see what `own` [..., m] allows: how many, and which, ascending."""
    return own.sum(-1), own.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int()
