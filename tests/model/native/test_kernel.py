from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from model.draft.draft import Draft
from model.draft.network import DraftNetwork, DraftShape
from model.draft.position_aware import StepMode
from model.kv_cache import Sight, Write
from model.layer import Layer, LayerWeights, fused_weights
from model.linear import PackedLinear
from model.native import kernel
from model.semantic_id import Vocabulary
from model.target import Target, TargetOutput

pytestmark = pytest.mark.skipif(kernel.load() is None, reason="the kernel is not compiled for this processor")
VOCABULARY = Vocabulary.compact((40, 30, 20))
DTYPES = (torch.float32, torch.bfloat16)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY.size,
    "hidden_size": 48,
    "intermediate_size": 72,  # neither whole panels nor whole half panels
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "head_dim": 16,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=4),
    "llama-grouped": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "llama-biased": LlamaConfig(**SHAPE, num_key_value_heads=1, attention_bias=True),
    "qwen2": Qwen2Config(**(SHAPE | {"hidden_size": 64}), num_key_value_heads=2),
    "qwen3": Qwen3Config(**(SHAPE | {"head_dim": 32}), num_key_value_heads=2),
}


class Rounding(PackedLinear):
    """The twin of a product of bf16 numbers that is summed in fp32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__(weight.float(), None if bias is None else bias.float())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x.bfloat16().float())

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual + self(x)


def pair(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> tuple[Target, Target]:
    """The same random weights twice: run by the kernel, and by torch, which rounds to bf16 where the kernel does."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.3)
    model = model.to(dtype)
    native, twin = Target(model, VOCABULARY), Target(model, VOCABULARY, native=False)
    assert native.native is not None
    assert twin.native is None
    if dtype == torch.bfloat16:
        weights = [fused_weights(source, *heads(twin)) for source in model.model.layers]
        whole = [LayerWeights(*(None if part is None else part.float() for part in layer)) for layer in weights]
        twin.layers = [Layer(layer, *heads(twin), config.rms_norm_eps) for layer in whole]
        for layer, own in zip(twin.layers, weights, strict=True):
            layer.qkv, layer.output = Rounding(own.qkv, own.qkv_bias), Rounding(own.output, own.output_bias)
            layer.gate_up, layer.down = Rounding(own.gate_up), Rounding(own.down)
        twin.embedding, twin.norm_scale, twin.dtype = twin.embedding.float(), twin.norm_scale.float(), torch.float32
    return native, twin


def heads(target: Target) -> tuple[int, int, int]:
    return target.num_heads, target.num_kv_heads, target.head_size


def close(one: TargetOutput, other: TargetOutput, kept: torch.Tensor, most: float = 3e-4) -> bool:
    pairs = zip((one.hidden, *one.features), (other.hidden, *other.features), strict=True)
    return all(torch.allclose(a[kept], b[kept], atol=most, rtol=most / 3) for a, b in pairs)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_and_a_tree_behind_it_give_what_torch_gives(name: str, threads: int, dtype: torch.dtype) -> None:
    """In bf16 the last bit of a sum may decide to which side the next input is rounded."""
    (native, twin), most = pair(CONFIGS[name], dtype), 3e-4 if dtype == torch.float32 else 3e-2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lengths = torch.tensor([9, 4, 1])
        tokens, rows = torch.randint(0, VOCABULARY.size, (3, 9)), torch.arange(3)[:, None]
        positions = torch.arange(9).expand(3, -1)
        padding = positions >= lengths[:, None]
        caches = [target.new_cache(4, 24) for target in (native, twin)]
        prompt = [
            target(tokens, positions, cache, Write(rows, positions).without(padding), Sight(None, None, 9), (0, 2))
            for target, cache in zip((native, twin), caches, strict=True)
        ]
        assert close(*prompt, kept=~padding, most=most)
        # A tree: every token sees the prompt, itself and a random few of those before it.
        new = torch.randint(0, VOCABULARY.size, (3, 7))
        own = (torch.rand(3, 7, 7) < 0.4).tril() | torch.eye(7, dtype=torch.bool)
        stored = lengths[:, None] + torch.arange(7)
        depth = lengths[:, None] + own.sum(-1) - 1
        tree = [
            target(new, depth, cache, Write(rows, stored), Sight(lengths, own, 16), (1,))
            for target, cache in zip((native, twin), caches, strict=True)
        ]
        assert close(*tree, kept=torch.ones(3, 7, dtype=torch.bool), most=most)
        logits = [target.item_logits(output.hidden) for target, output in zip((native, twin), tree, strict=True)]
        assert torch.allclose(*logits, atol=most, rtol=most / 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_to_the_last_bit_alone_in_a_batch_and_as_a_guess(name: str, dtype: torch.dtype) -> None:
    native, _ = pair(CONFIGS[name], dtype)
    tokens = torch.randint(0, VOCABULARY.size, (5, 12))
    positions, rows = torch.arange(12).expand(5, -1), torch.arange(5)[:, None]
    whole = native(tokens, positions, native.new_cache(5, 20), Write(rows, positions), Sight(None, None, 12))
    cache, alone = native.new_cache(1, 20), []
    for place in range(12):
        at = Write(rows[:1], positions[:1, place : place + 1], 0, place)
        sight = Sight(torch.tensor([place]), None, 20)
        alone.append(native(tokens[2:3, place : place + 1], at.positions, cache, at, sight).hidden[0])
    assert torch.equal(torch.cat(alone), whole.hidden[2])
    assert torch.equal(native.item_logits(whole.hidden)[2, 3], native.item_logits(whole.hidden[2:3, 3:4])[0, 0])
    # The last four tokens again, now as a branch of a tree with strangers between them.
    cache = native.new_cache(1, 20)
    prompt = Write(rows[:1], positions[:1, :8], 0, 0)
    native(tokens[2:3, :8], prompt.positions, cache, prompt, Sight(None, None, 8))
    branch = torch.tensor([0, 2, 3, 6])
    guesses = torch.randint(0, VOCABULARY.size, (1, 7))
    guesses[0, branch] = tokens[2, 8:]
    own = torch.eye(7, dtype=torch.bool)[None].clone()
    own[0, branch[:, None], branch] = torch.ones(4, 4, dtype=torch.bool).tril()
    depth = torch.zeros(1, 7, dtype=torch.int64)
    depth[0, branch] = torch.arange(4)
    stored = 8 + torch.arange(7)[None]
    tree = native(guesses, 8 + depth, cache, Write(rows[:1], stored), Sight(torch.tensor([8]), own, 15))
    assert torch.equal(tree.hidden[0, branch], whole.hidden[2, 8:])


@pytest.mark.parametrize(("rows", "out"), [(1, 64), (5, 70), (23, 300), (200, 16)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_layer_gives_what_torch_gives(rows: int, out: int, biased: bool) -> None:
    weight, x = torch.randn(out, 40), torch.randn(rows, 40)
    bias = torch.randn(out) if biased else None
    assert torch.allclose(kernel.NativeLinear(weight, bias)(x), PackedLinear(weight, bias)(x), atol=1e-4)


@pytest.mark.parametrize("columns", [40, 41])
@pytest.mark.parametrize(("rows", "out"), [(1, 64), (5, 70), (23, 300), (400, 16)])
@pytest.mark.parametrize("level", ["v3", "v4"])
def test_bf16_layers_multiply_what_bf16_holds_and_sum_in_fp32(level: str, rows: int, out: int, columns: int) -> None:
    """Whether the processor has products of bf16 pairs or they are unpacked."""
    if level == "v4" and kernel.VARIANTS[torch.backends.cpu.get_cpu_capability()] != level:
        pytest.skip("this processor cannot run it")
    library, layer = kernel.opened(level), kernel.NativeLinear(torch.randn(out, columns).bfloat16(), torch.randn(out))
    assert library is not None and layer.bias is not None
    x, found = torch.randn(rows, columns), torch.empty(rows, out)
    tensors = (x.data_ptr(), layer.packed.data_ptr(), layer.bias.data_ptr(), found.data_ptr())
    library.padrec_linear(*tensors, rows, columns, out, 1, 2)
    expected = Rounding(layer.weight, layer.bias[:out])(x)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layers", [(), (0, 1), (0, 2)])
def test_one_token_asked_of_each_row_is_what_it_is_where_all_are(name: str, layers: tuple[int, ...]) -> None:
    """To the last bit; and what is left out for the others is missed by nobody behind them."""
    tokens, length = torch.randint(0, VOCABULARY.size, (3, 9)), torch.tensor([9, 4, 7])
    positions = torch.arange(9).expand(3, -1)
    at = Write(torch.arange(3)[:, None], positions).without(positions >= length[:, None])
    for target in pair(CONFIGS[name]):
        given = (tokens, positions, target.new_cache(3, 16), at, Sight(None, None, 9), layers)
        again = (*given[:2], target.new_cache(3, 16), *given[3:])
        whole, one = target(*given), target(*again, length - 1)
        assert torch.equal(one.hidden[:, 0], whole.hidden[torch.arange(3), length - 1])
        assert torch.equal(given[2].data, again[2].data)
        assert all(torch.equal(a, b) for a, b in zip(one.features, whole.features, strict=True))


def test_shapes_it_cannot_run_are_left_to_torch() -> None:
    cpu = torch.device("cpu")
    assert kernel.fits(128, 32, torch.float32, cpu)
    assert kernel.fits(128, 32, torch.bfloat16, cpu)
    assert not kernel.fits(128, 32, torch.float16, cpu)
    assert not kernel.fits(120, 32, torch.float32, cpu)
    assert not kernel.fits(128, 8, torch.float32, cpu)
    assert not kernel.fits(128, 512, torch.float32, cpu)
    odd = LlamaConfig(**(SHAPE | {"head_dim": 8}), num_key_value_heads=4)
    assert Target(AutoModelForCausalLM.from_config(odd), VOCABULARY).native is None


def test_large_and_equal_scores_do_not_overflow() -> None:
    native, twin = pair(CONFIGS["llama"])
    tokens = torch.full((1, 12), 5)
    positions = torch.arange(12)[None]
    at, sight = Write(torch.zeros(1, 1, dtype=torch.int64), positions), Sight(None, None, 12)
    outputs = [target(tokens, positions, target.new_cache(1, 12), at, sight) for target in (native, twin)]
    assert close(*outputs, kept=torch.ones(1, 12, dtype=torch.bool))


@pytest.mark.parametrize("steps", ["none", "ungated", "gated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draft_reads_and_answers_as_torch_does(steps: StepMode, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    shape = DraftShape(48, 3, 40, VOCABULARY.num_slots, 3, (0,), steps == "gated", steps)
    network = DraftNetwork(shape)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    embedding, most = torch.randn(VOCABULARY.size, 48).to(dtype), 3e-4
    drafts = [Draft(network, embedding, VOCABULARY, native=native) for native in (True, False)]
    assert drafts[0].native is not None
    if dtype == torch.bfloat16:
        most = 3e-2
        for name in ("feature_part", "qkv", "output", "gate_up", "down"):
            setattr(drafts[1], name, Rounding(getattr(drafts[1], name).weight.to(dtype)))
    caches = [draft.new_cache(3, 30) for draft in drafts]
    rows, committed = torch.arange(3)[:, None], torch.tensor([5, 3, 4])
    tokens, features = torch.randint(0, VOCABULARY.size, (3, 6)), torch.randn(3, 6, 48)
    positions = torch.arange(6).expand(3, -1)
    for draft, cache in zip(drafts, caches, strict=True):
        draft.read(tokens, features, positions, 0, cache, Write(rows, positions))
    assert torch.allclose(caches[0].data, caches[1].data, atol=most)
    last, alone = torch.tensor([[4], [2], [3]]), Sight(committed, None, 6)
    asked = [
        draft.ask(tokens, features, positions, 0, cache, Write(rows, positions), last, alone)
        for draft, cache in zip(drafts, caches, strict=True)
    ]
    assert torch.allclose(*asked, atol=most)
    for step in (1, 2, 5):  # past the last trained step too
        own = torch.rand(3, 2, 6) < 0.6
        stored = committed[:, None] + torch.arange(6)
        outputs = [
            draft.ask(
                tokens,
                features,
                stored,
                step,
                cache,
                Write(rows, stored),
                torch.tensor([[1, 5], [0, 3], [2, 2]]),
                Sight(committed, own, 11),
            )
            for draft, cache in zip(drafts, caches, strict=True)
        ]
        assert torch.allclose(*outputs, atol=most)


def test_what_points_outside_is_refused_and_nothing_is_written() -> None:
    native, _ = pair(CONFIGS["llama"])
    cache = native.new_cache(2, 6)
    row, places = torch.zeros(1, 1, dtype=torch.int64), torch.arange(6)[None]
    tokens, first = torch.randint(0, VOCABULARY.size, (1, 6)), Sight(None, None, 6)
    wrong = [
        (tokens, places, Write(row, places + 1), first),
        (tokens, places, Write(row + 2, places), first),
        (tokens, places, Write(row - 1, places), first),
        (tokens + VOCABULARY.size, places, Write(row, places), first),
        (tokens, places + 5000, Write(row, places), first),
        (tokens, places, Write(row, places), Sight(torch.tensor([1]), None, 6)),
    ]
    for inputs, positions, at, sight in wrong:
        with pytest.raises(IndexError, match="outside"):
            native(inputs, positions, cache, at, sight)
    assert not bool(cache.data.any())
    native(tokens.int(), places, cache, Write(row, places), first)
    assert bool(cache.data.any())


def test_two_threads_may_run_passes_of_one_model_at_once() -> None:
    native, _ = pair(CONFIGS["llama"])
    tokens = torch.randint(0, VOCABULARY.size, (4, 40))
    positions, rows = torch.arange(40).expand(4, -1), torch.arange(4)[:, None]

    def hidden(_: int) -> torch.Tensor:
        return native(tokens, positions, native.new_cache(4, 40), Write(rows, positions), Sight(None, None, 40)).hidden

    right = hidden(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, right) for found in pool.map(hidden, range(60)))
