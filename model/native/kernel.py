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

from model.item_trie import Availability, ItemTrie
from model.kv_cache import Sight, TreeSight, Write
from model.layer import LayerWeights

Tensor = torch.Tensor
PANEL = 64
VARIANTS = {"AVX512": "v4", "AVX2": "v3"}  # what torch calls the processor -> the x86-64 level compiled for
MAX_HEAD_SIZE = 256
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
        *((name, ctypes.c_float) for name in ("norm_floor", "head_floor")),
        *((name, _pointer) for name in ("layer", "embedding", "norm_scale")),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("tokens", "rows", "positions", "turns", "extra", "stride", "num_features")),
        *((name, _pointer) for name in ("token", "row", "at", "position", "committed", "seeing", "feature_layers")),
        *((name, _pointer) for name in ("seen", "rotations", "cache", "hidden", "features")),
    ]


class _Draft(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("vocabulary", "size", "heads", "head_size", "feed")),
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


class _Trie(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("items", "levels", "nodes", "first_leaf", "size")),
        *((name, _pointer) for name in ("leaf_start", "first_child", "column", "level_columns")),
        *((name, _pointer) for name in ("run_end", "item_tokens", "depth", "head")),
    ]


class _May(ctypes.Structure):
    _fields_ = [("width", _number), *((name, _pointer) for name in ("passing", "filter_slot", "excluded"))]


class _Groups(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("rows", "groups")),
        *((name, _pointer) for name in ("node", "leaf", "length", "hidden", "best", "child", "score")),
    ]


class _Chain(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("rows", "steps", "gains", "cache_rows", "positions", "turns")),
        *((name, _pointer) for name in ("node", "position", "remaining", "fresh_tokens", "fresh_length")),
        *((name, _pointer) for name in ("fresh_feature", "rotations")),
        *((name, _pointer) for name in ("step", "context", "gate", "cache")),
        *((name, _pointer) for name in ("tokens", "length", "leaf", "end", "choice", "slot", "start")),
    ]


class _Runs(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("rows", "groups", "places", "cache_rows", "positions", "turns", "num_features")),
        *((name, _pointer) for name in ("tokens", "length", "base", "feature_layers")),
        *((name, _pointer) for name in ("rotations", "cache", "hidden", "features")),
    ]


@cache
def load() -> Any | None:
    """The compiled library, or None."""
    variant = VARIANTS.get(torch.backends.cpu.get_cpu_capability())
    found = sorted(Path(__file__).parent.glob(f"_kernel_{variant}*.so"))
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    library.padrec_pass.argtypes = [_pointer, _pointer, ctypes.c_int]
    library.padrec_read.argtypes = [_pointer, _pointer, ctypes.c_int]
    library.padrec_choose.argtypes = [_pointer] * 3 + [ctypes.c_int]
    library.padrec_chain.argtypes = [_pointer] * 4 + [ctypes.c_int]
    library.padrec_runs.argtypes = [_pointer, _pointer, ctypes.c_int]
    library.padrec_linear.argtypes = [_pointer] * 4 + [_number] * 3 + [ctypes.c_int]
    return library


def fits(size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel is there and can run such a model."""
    whole = size % 16 == 0 and head_size % 16 == 0 and head_size <= MAX_HEAD_SIZE
    return whole and dtype == torch.float32 and device.type == "cpu" and load() is not None


def pack(weight: Tensor) -> Tensor:
    """[out, in] to panels [ceil(out / PANEL), in, PANEL], zeros behind the last row."""
    return _padded(weight, PANEL).view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def pack_gated(gate_up: Tensor) -> Tensor:
    """[2 f, in] to panels of PANEL / 2 gates and the PANEL / 2 values they act on."""
    half, columns = PANEL // 2, gate_up.shape[1]
    parts = [_padded(part, half).view(-1, half, columns) for part in gate_up.chunk(2)]
    return torch.cat(parts, dim=1).transpose(1, 2).contiguous()


class NativeLinear:
    """`x @ weight.T (+ bias)` whose rows do not depend on their company, to the last bit."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight.detach()
        self.out, self.columns = weight.shape
        self.packed = pack(self.weight)
        self.bias = None if bias is None else _padded(bias, PANEL)

    def __call__(self, x: Tensor) -> Tensor:
        """x [m, in] float32."""
        library, x = load(), x.contiguous()
        assert library is not None
        out = torch.empty(x.shape[0], self.out)
        bias = None if self.bias is None else self.bias.data_ptr()
        sizes = (x.shape[0], self.columns, self.out, torch.get_num_threads())
        library.padrec_linear(x.data_ptr(), self.packed.data_ptr(), bias, out.data_ptr(), *sizes)
        return out


class NativeTarget:
    """The layers of a target, and its last norm."""

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
        self._kept: list[Tensor] = [embedding.contiguous(), norm_scale.contiguous()]
        packed = (_Layer * len(layers))(*(self._packed(layer) for layer in layers))
        self._layers = packed
        feed = layers[0].down.shape[1]
        self._model = _Model(
            len(embedding),
            len(layers),
            self.size,
            *heads,
            feed,
            *floors,
            ctypes.addressof(packed),
            self._kept[0].data_ptr(),
            self._kept[1].data_ptr(),
        )

    def __call__(
        self, tokens: Tensor, places: Places, cache: Tensor, rotations: Tensor, features: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """`tokens` [N]; `cache` [layers, 2, R, G, T, s]; `rotations` complex [positions, s/2]. Returns the hidden
        states [N, d] after the last norm and the outputs [N, d] of the layers `features`."""
        library = load()
        assert library is not None
        rows, positions = cache.shape[2], cache.shape[4]
        count, extra, threads = len(tokens), places.seen.shape[1], torch.get_num_threads()
        held = [tokens.long().contiguous(), *_ready(places)]
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
            *(tensor.data_ptr() for tensor in held[:6]),
            ctypes.addressof(layers),
            held[6].data_ptr(),
            rotations.data_ptr(),
            cache.data_ptr(),
            outputs.data_ptr(),
            ctypes.addressof(into),
        )
        if library.padrec_pass(ctypes.byref(self._model), ctypes.byref(one), threads):
            raise IndexError("a token, row or position lies outside the model or its cache")
        return outputs[0], list(outputs[1:])

    def runs(
        self, tokens: Tensor, length: Tensor, base: Tensor, cache: Tensor, rotations: Tensor, features: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A pass over chains of runs, `tokens` [B, G, Q] of `length` [B, G], stored from `base` [B] on, each token
        seeing all before it. Hidden states and features [B, G, d] at the last token of each run (of the run before,
        where `length` is 0)."""
        library = load()
        assert library is not None
        (rows, groups, places), threads = tokens.shape, torch.get_num_threads()
        held = [tensor.long().contiguous() for tensor in (tokens, length, base)]
        outputs = torch.empty(1 + len(features), rows, groups, self.size)
        layers = (_number * len(features))(*features)
        into = (_pointer * len(features))(*(output.data_ptr() for output in outputs[1:]))
        one = _Runs(
            rows,
            groups,
            places,
            cache.shape[2],
            cache.shape[4],
            len(rotations),
            len(features),
            *(tensor.data_ptr() for tensor in held),
            ctypes.addressof(layers),
            rotations.data_ptr(),
            cache.data_ptr(),
            outputs.data_ptr(),
            ctypes.addressof(into),
        )
        if library.padrec_runs(ctypes.byref(self._model), ctypes.byref(one), threads):
            raise IndexError("a token, row or position lies outside the model or its cache")
        return outputs[0], tuple(outputs[1:])

    def _packed(self, layer: LayerWeights) -> _Layer:
        tensors = LayerWeights(
            pack(layer.qkv),
            None if layer.qkv_bias is None else _padded(layer.qkv_bias, PANEL),
            None if layer.qk_scale is None else layer.qk_scale.contiguous(),
            pack(layer.output),
            None if layer.output_bias is None else _padded(layer.output_bias, PANEL),
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


class NativeDraft:
    """A draft's layer over a row KV cache of one layer."""

    def __init__(self, weights: DraftWeights, heads: int, head_size: int, floor: float) -> None:
        self.size = weights.down.shape[0]
        self._kept = DraftWeights(
            token_part=weights.token_part.contiguous(),
            feature_part=pack(weights.feature_part),
            qkv=pack(weights.qkv),
            output=pack(weights.output),
            gate_up=pack_gated(weights.gate_up),
            down=pack(weights.down),
            last_scale=weights.last_scale.contiguous(),
        )
        sizes = (len(weights.token_part), self.size, heads, head_size, weights.down.shape[1])
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


class ChainRoot(NamedTuple):
    """Where chains start: `node`, `position` of the next token and `remaining` items to guess at, each [B]; and what
    the draft reads first: the fresh runs [B, g, Q] of `fresh_length` [B, g], with their features [B, g, d]."""

    node: Tensor
    position: Tensor
    remaining: Tensor
    fresh_tokens: Tensor
    fresh_length: Tensor
    fresh_feature: Tensor


class Chain(NamedTuple):
    """A chain of J draft choices a row, as in `model.decoding.draft_tree.DraftTree` with one node a step: `tokens`
    [B, J, L + 1], the rest [B, J]."""

    tokens: Tensor
    length: Tensor
    leaf: Tensor
    end: Tensor
    choice: Tensor
    slot: Tensor
    start: Tensor


class NativeChoices:
    """Choices among legal children of an item trie by a target's head, and chains of them by a draft."""

    def __init__(self, trie: ItemTrie, head: NativeLinear) -> None:
        sizes = trie.vocabulary.codebook_sizes
        self._columns = torch.tensor([0, *sizes]).cumsum(0)
        self._kept = (trie, head)
        tables = (trie.leaf_start, trie.first_child, trie.column, self._columns, trie.run_end, trie.item_tokens)
        pointers = (table.data_ptr() for table in (*tables, trie.depth, head.packed))
        shape = (trie.num_items, trie.num_levels, trie.num_nodes, trie.first_leaf, head.columns)
        self._trie, self.places = _Trie(*shape, *pointers), trie.num_levels + 1

    def best(
        self, hidden: Tensor, nodes: Tensor, may: Availability, leaf: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For `hidden` [B, G, d] at `nodes` [B, G]: index [B, G] of the best legal child among the children, the
        child, and its log-probability in nats. Group g lies behind the first g runs of its row, which completed
        `leaf` [B, G - 1] and have `length` [B, G - 1] tokens (0: there is no such group; what is said of it means
        nothing)."""
        library = load()
        assert library is not None
        best, child, score = torch.empty_like(nodes), torch.empty_like(nodes), torch.empty(nodes.shape)
        held = tuple(tensor.contiguous() for tensor in (nodes, leaf, length, hidden))
        outputs = (best, child, score)
        groups = _Groups(*nodes.shape, *(tensor.data_ptr() for tensor in (*held, *outputs)))
        allowed, kept = _allowed(may)
        given = (ctypes.byref(self._trie), ctypes.byref(allowed), ctypes.byref(groups))
        if library.padrec_choose(*given, torch.get_num_threads()):
            raise IndexError("a node lies outside the trie")
        del kept
        return outputs

    def chain(
        self,
        draft: NativeDraft,
        terms: Sequence[StepTerm | None],
        cache: Tensor,
        rotations: Tensor,
        may: Availability,
        root: ChainRoot,
    ) -> Chain:
        """Read the fresh runs with the first of `terms`, then draft one choice for each of them, the best legal one;
        keys and values go where they stay if it is accepted."""
        library = load()
        assert library is not None
        rows, steps = len(root.node), len(terms)
        shape = (rows, steps)
        tokens = torch.empty(rows, steps, self.places, dtype=torch.int64)
        outputs = (tokens, *torch.empty(6, *shape, dtype=torch.int64).unbind())
        held = [tensor.contiguous() for tensor in root]
        pointers = [None if term is None else term.embedding.data_ptr() for term in terms]
        contexts = [None if term is None or term.context is None else term.context.data_ptr() for term in terms]
        arrays = ((_pointer * steps)(*pointers), (_pointer * steps)(*contexts))
        gates = (ctypes.c_float * steps)(*(0.0 if term is None else term.constant for term in terms))
        given = _Chain(
            *shape,
            root.fresh_length.shape[1],
            cache.shape[2],
            cache.shape[4],
            len(rotations),
            *(tensor.data_ptr() for tensor in held),
            rotations.data_ptr(),
            *(ctypes.addressof(array) for array in (*arrays, gates)),
            cache.data_ptr(),
            *(tensor.data_ptr() for tensor in outputs),
        )
        allowed, kept = _allowed(may)
        called = (ctypes.byref(self._trie), ctypes.byref(allowed), draft.pointer, ctypes.byref(given))
        if library.padrec_chain(*called, torch.get_num_threads()):
            raise IndexError("a token, node or position lies outside the model, the trie or the cache")
        del kept
        return Chain(*outputs)


def _allowed(may: Availability) -> tuple[_May, list[Tensor]]:
    """What rows may emit as the kernel takes it, and the tensors to keep alive meanwhile."""
    held = [tensor.contiguous() for tensor in may]
    return _May(may.excluded.shape[1], *(tensor.data_ptr() for tensor in held)), held


def _ready(places: Places) -> list[Tensor]:
    """As the kernel reads them: nothing there knows of types or strides."""
    return [*(tensor.long().contiguous() for tensor in places[:-1]), places.seen.int().contiguous()]


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """`rows` with zeros behind them up to a multiple."""
    padded = torch.zeros(-(-len(rows) // multiple) * multiple, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


def _lines(own: Tensor) -> tuple[Tensor, Tensor]:
    """`seeing` and `seen` of tokens that see what `own` [..., m] allows: how many, and which, ascending."""
    return own.sum(-1), own.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int()
