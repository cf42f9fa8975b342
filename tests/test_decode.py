"""Token by token: the delta layer's fused kernel, sampling, the end of a continuation, the buffer of a KV cache."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import deltanet_ref as dr
from deltanet_ref import ops
from deltanet_ref.backends import numba_cpu as nb
from deltanet_ref.errors import InputError
from deltanet_ref.model.generate import sample
from deltanet_ref.model.layers.gated_attention import AttentionState
from deltanet_ref.model.qwen35 import PREFILL_TOKENS
from tests.paths import FIXTURES
from tests.test_ops_backward import BOTH
from tests.tolerances import assert_identical, assert_within_floors, half_ulp, noise_floors


def composed(qkv, z, b, a, conv_state, S, *, conv, decay, dt_bias, norm, eps, head_order):
    """The operators of ops one after the other, in float64; the last result is o before its norm."""
    (N, H_v, d_k, d_v), width = S.shape, conv_state.shape[2]
    keys = (width - H_v * d_v) // 2
    y, new_conv_state, _ = ops.causal_conv1d_forward(qkv[:, None], conv, state=conv_state)
    q, k, v = (x.reshape(N, 1, -1, d) for x, d in zip(np.split(y, [keys, 2 * keys], -1), (d_k, d_k, d_v)))
    q, k = ops.l2_norm_forward(q)[0], ops.l2_norm_forward(k)[0]
    g, beta, _ = ops.decay_gate_forward(a[:, None], b[:, None], np.log(-decay), dt_bias)
    o, new_S = ops.gated_delta_rule_step(
        q[:, 0], k[:, 0], v[:, 0], g=g[:, 0], beta=beta[:, 0], S=S, head_order=head_order
    )
    return ops.gated_rms_norm_forward(o, z.reshape(o.shape), norm, eps)[0], new_conv_state, new_S, o


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(2, 5),
    st.sampled_from(["tiled", "grouped"]),
)
def test_a_delta_layer_in_one_kernel_is_the_operators_one_after_the_other(seed, N, H_k, ratio, d_k, d_v, K, head_order):
    rng, H_v = np.random.default_rng(seed), H_k * ratio
    width = 2 * H_k * d_k + H_v * d_v
    shapes = [(N, width), (N, H_v * d_v), (N, H_v), (N, H_v), (N, K - 1, width), (N, H_v, d_k, d_v)]
    arrays = [rng.standard_normal(shape) for shape in shapes]
    tensors = dict(
        conv=rng.standard_normal((width, K)),
        decay=-np.exp(rng.standard_normal(H_v)),
        dt_bias=rng.standard_normal(H_v),
        norm=rng.standard_normal(d_v),
    )

    def called(step, x):
        return list(step(*x[:6], **dict(zip(tensors, x[6:])), eps=1e-6, head_order=head_order))

    everything = [*arrays, *tensors.values()]
    for dtype in (np.float64, np.float32):
        x = [array.astype(dtype) for array in everything]
        before = [array.copy() for array in x]
        found = called(nb.delta_layer_step, x)
        *exact, o = called(composed, [array.astype(np.float64) for array in x])
        floors = noise_floors(lambda x: called(composed, x), x, dtype)[:3]
        # Where beta is about 1 the old state cancels, and is rounded at the size that it had (S is of normal numbers, v
        # below 4); the norm divides by o's root mean square what that makes of o.
        replaced = half_ulp(dtype) * (np.linalg.norm(x[5]) + 4 * (N * H_v * d_v) ** 0.5)
        smallest = np.sqrt(np.mean(o * o, -1).min() + 1e-6)
        floors += [replaced * np.abs(x[1]).max() * np.abs(tensors["norm"]).max() / smallest, 0, replaced]
        assert all(result.dtype == dtype for result in found)
        assert_within_floors(("o", "conv_state", "S"), found, exact, floors, BOTH)
        for array, same in zip(x, before, strict=True):
            assert_identical("argument", array, same)
    with pytest.raises(InputError, match="float32 and float64"):
        nb.delta_layer_step(*arrays[:5], arrays[5].astype(np.float32), **tensors, eps=1e-6, head_order=head_order)


def definition(logits, temperature, top_k, top_p, rng):
    """Sort all, keep k, keep those that reach p together, draw."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]  # stable: lower ids first
    p = np.exp((logits[order] - logits[order[0]]).astype(np.float64) / temperature)
    p /= p.sum()
    n = next((n for n in range(1, len(p)) if p[:n].sum() >= top_p), len(p))
    return order[min(np.searchsorted(np.cumsum(p[:n] / p[:n].sum()), rng.random(), "right"), n - 1)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(0, 70), st.sampled_from([0.1, 0.7, 0.95, 1.0]))
def test_sampling_is_what_sorting_everything_gives(seed, V, top_k, top_p):
    rng = np.random.default_rng(seed)
    logits = rng.choice([rng.standard_normal(V), np.round(rng.standard_normal(V))]).astype(np.float32)  # also ties
    found, expected = (f(logits, 0.8, top_k, top_p, np.random.default_rng(seed)) for f in (sample, definition))
    assert found == expected
    assert sample(logits, 0, top_k, top_p, rng) == np.argmax(logits)


def test_not_a_number_does_not_end_a_generation():
    logits = np.array([1, np.nan, 3], np.float32)
    with np.errstate(invalid="ignore"):
        assert sample(logits, 1.0, 2, 1.0, np.random.default_rng(0)) in range(3)


def keys_values(rng, L):
    return rng.standard_normal((2, 1, L, 3, 5))


def test_a_cache_that_grows_token_by_token_is_the_concatenation_and_is_seldom_copied():
    rng = np.random.default_rng(0)
    pieces = [keys_values(rng, L) for L in (7, *[1] * 200, 90, 1)]
    state, buffers = AttentionState(*pieces[0]), set()
    for i, piece in enumerate(pieces[1:], 2):
        state = state.append(*piece, np)
        buffers.add(id(state.buffer))
        for found, expected in zip(state, np.concatenate(pieces[:i], 2), strict=True):
            assert_identical("keys and values", found, expected)
    assert len(buffers) <= 4  # 72, then a quarter more than what was needed and 64, each time


def test_a_cache_that_is_continued_twice_gives_each_continuation_its_own():
    rng = np.random.default_rng(1)
    start = AttentionState(*keys_values(rng, 4)).append(*keys_values(rng, 2), np)
    before = [x.copy() for x in start]
    more = [keys_values(rng, n) for n in (1, 3, 2)]
    states = [start.append(*m, np) for m in more]
    for state, (k, v) in zip(states, more):
        assert_identical("k", state.k, np.concatenate([before[0], k], 1))
        assert_identical("v", state.v, np.concatenate([before[1], v], 1))
    for x, y in zip(start, before, strict=True):
        assert_identical("what was continued", x, y)
    assert states[0].buffer is start.buffer and not np.shares_memory(states[1].k, states[2].k)


PASSES = 2 * PREFILL_TOKENS - 30  # tokens of a prompt that is read in two passes


def model_of_context(context):
    model = dr.load_model(FIXTURES / "eq" / "eq-f32.gguf", backend="numpy")
    model.config = replace(model.config, max_position_embeddings=context)
    return model


def test_a_long_prompt_is_read_in_passes_that_are_reported_and_change_nothing():
    model, done = model_of_context(2 * PASSES), []
    prompt = np.random.default_rng(2).integers(0, 400, PASSES).tolist()
    pieces = dr.generate(
        model, prompt, max_tokens=3, temperature=0, return_ids=True, on_prefill=lambda *progress: done.append(progress)
    )
    assert not done and pieces.finish_reason is None  # nothing is computed before it is asked for
    tokens = list(pieces)
    assert done == [(PREFILL_TOKENS, PASSES), (PASSES, PASSES)]
    logits, state = model.prefill(prompt)
    for token in tokens:
        assert token == np.argmax(logits)
        logits, state = model.step(token, state)
    assert (pieces.ids, pieces.prompt_tokens, pieces.finish_reason) == (tokens, PASSES, "length")


@pytest.mark.parametrize("room, max_tokens, reason", [(1, 9, "context"), (4, 9, "context"), (4, 4, "length")])
def test_prompt_and_continuation_fill_the_context_and_no_more(room, max_tokens, reason):
    model = model_of_context(5 + room)
    pieces = dr.generate(model, [5, 17, 3, 99, 204], max_tokens=max_tokens, temperature=50.0, top_k=0, top_p=1, seed=1)
    "".join(pieces)
    assert (len(pieces.ids), pieces.finish_reason) == (min(room, max_tokens), reason)


def test_a_prompt_without_room_for_an_answer_is_refused_before_anything_is_computed():
    for length in (5, 6):
        with pytest.raises(InputError, match=f"the prompt has {length} tokens and leaves no room .* context of 5"):
            dr.generate(model_of_context(5), [1] * length, return_ids=True)


def test_the_end_of_turn_token_ends_a_continuation(monkeypatch):
    model = model_of_context(99)
    (end, *_) = model.tokenizer.eos_ids
    monkeypatch.setattr("deltanet_ref.model.generate.sample", lambda logits, **options: end)
    pieces = dr.generate(model, "alpha")
    assert ("".join(pieces), pieces.ids, pieces.finish_reason) == ("", [end], "stop")


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}])
def test_sampling_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match="`max_tokens` .* must be at least 1"):
        dr.generate(model_of_context(99), "alpha", **options)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_greedy_generation_is_the_argmax_of_the_full_forward(backend):
    model = dr.load_model(FIXTURES / "quant" / "quant-Q4_K_M.gguf", backend=backend)
    prompt = [5, 17, 3, 99, 204]
    tokens = list(dr.generate(model, prompt, max_tokens=12, temperature=0, return_ids=True))
    logits = model.logits(np.array([prompt + tokens]))[0]
    assert tokens == logits[len(prompt) - 1 : -1].argmax(1).tolist()
