"""Attention against a naive dense softmax, and its memory: past keys, packed sequences, blocks of queries."""

import numpy as np
import pytest
from scipy.special import expit, softmax

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from deltanet_ref.ops import softmax_attention
from tests.test_ops_backward import BOTH
from tests.tolerances import assert_identical, assert_within, assert_within_floors, noise_floors, rounding

RNG = np.random.default_rng(5)
CU = np.array([0, 1, 3, 3, 6, 11])


def random_qkv(B, L, M, H, H_kv, d, d_v):
    return (
        RNG.standard_normal((B, L, H, d)),
        RNG.standard_normal((B, M, H_kv, d)),
        RNG.standard_normal((B, M, H_kv, d_v)),
    )


def dense(q, k, v, scale):
    """One query and one head at a time, its keys picked by hand."""
    B, L, H, _ = q.shape
    M, H_kv = k.shape[1:3]
    o = np.empty((B, L, H, v.shape[3]))
    for b, t, h in np.ndindex(B, L, H):
        seen, kv_head = M - L + t + 1, h * H_kv // H
        o[b, t, h] = softmax(scale * k[b, :seen, kv_head] @ q[b, t, h]) @ v[b, :seen, kv_head]
    return o


@pytest.mark.parametrize(
    "B, L, M, H, H_kv, d, d_v",
    [(2, 5, 5, 6, 3, 4, 4), (1, 7, 7, 4, 1, 3, 5), (2, 3, 8, 6, 2, 5, 4), (3, 1, 6, 4, 4, 5, 2), (1, 1, 1, 3, 1, 2, 4)],
)
def test_attention_equals_the_naive_dense_softmax(B, L, M, H, H_kv, d, d_v):
    q, k, v = random_qkv(B, L, M, H, H_kv, d, d_v)
    o, _ = ops.softmax_attention_forward(q, k, v)
    assert_within("o", o, dense(q, k, v, d**-0.5), limit(q, k, v, d**-0.5))
    o, _ = ops.softmax_attention_forward(q, k, v, scale=1.7)
    assert_within("o at scale 1.7", o, dense(q, k, v, 1.7), limit(q, k, v, 1.7))


def limit(q, k, v, scale):
    """Scores are off by eps times their largest size and the d products of a sum, P by as much, o by M more."""
    score = abs(scale) * np.abs(q).max() * np.abs(k).max() * q.shape[-1]
    return rounding(2 * (score * (1 + q.shape[-1]) + k.shape[1])) * np.abs(v).max()


RESULTS = ("o", "dq", "dk", "dv")


def floors(*arrays):
    return noise_floors(lambda x: list(full_run(*x)), arrays, np.float64)


def full_run(q, k, v, do, **options):
    o, cache = ops.softmax_attention_forward(q, k, v, **options)
    return o, *ops.softmax_attention_backward(do, cache)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_blocks_of_queries_change_nothing_but_rounding(monkeypatch, rows):
    q, k, v = random_qkv(2, 11, 13, 6, 3, 4, 5)
    do = RNG.standard_normal((2, 11, 6, 5))
    in_one = full_run(q, k, v, do)
    monkeypatch.setattr(softmax_attention, "ROWS", rows)
    assert_within_floors(RESULTS, full_run(q, k, v, do), in_one, floors(q, k, v, do), BOTH)


def test_a_length_beyond_one_block_equals_the_dense_softmax():
    L = softmax_attention.ROWS + 37
    q, k, v = random_qkv(1, L, L + 5, 2, 1, 3, 4)
    o, _ = ops.softmax_attention_forward(q, k, v)
    assert_within("o", o, dense(q, k, v, 3**-0.5), limit(q, k, v, 3**-0.5))


@pytest.mark.parametrize("split", range(1, 7))
def test_prefill_with_past_keys_equals_one_run_at_every_split_forward_and_backward(split):
    q, k, v = random_qkv(2, 7, 7, 6, 3, 4, 5)
    do = RNG.standard_normal((2, 7, 6, 5))
    o, dq, dk, dv = full_run(q, k, v, do)
    o_1, dq_1, dk_1, dv_1 = full_run(q[:, :split], k[:, :split], v[:, :split], do[:, :split])
    o_2, dq_2, dk_2, dv_2 = full_run(q[:, split:], k, v, do[:, split:])
    dk_2[:, :split] += dk_1
    dv_2[:, :split] += dv_1
    found = np.concatenate([o_1, o_2], 1), np.concatenate([dq_1, dq_2], 1), dk_2, dv_2
    assert_within_floors(RESULTS, found, (o, dq, dk, dv), floors(q, k, v, do), BOTH)


def test_packed_sequences_equal_separate_runs_bit_for_bit():
    q, k, v = random_qkv(1, 11, 11, 6, 3, 4, 5)
    do = RNG.standard_normal((1, 11, 6, 5))
    packed = full_run(q, k, v, do, cu_seqlens=CU)
    for start, stop in zip(CU, CU[1:]):
        alone = full_run(*(x[:, start:stop] for x in (q, k, v, do)))
        for name, p, a in zip(RESULTS, packed, alone, strict=True):
            assert_identical(f"{name} of tokens {start} .. {stop}", p[:, start:stop], a)


@pytest.mark.parametrize("moved", [n for n in range(5) if CU[n] < CU[n + 1]])
def test_a_packed_sequence_does_not_touch_the_others(moved):
    arrays = [*random_qkv(1, 11, 11, 6, 3, 4, 5), RNG.standard_normal((1, 11, 6, 5))]
    before = full_run(*arrays, cu_seqlens=CU)
    tokens = slice(CU[moved], CU[moved + 1])
    for x in arrays:
        x[:, tokens] += RNG.standard_normal(x[:, tokens].shape)
    after = full_run(*arrays, cu_seqlens=CU)
    elsewhere = np.ones(11, bool)
    elsewhere[tokens] = False
    for name, b, a in zip(RESULTS, before, after, strict=True):
        assert_identical(f"{name} of the others", a[:, elsewhere], b[:, elsewhere])
    assert not np.array_equal(before[0][:, tokens], after[0][:, tokens])


def test_later_keys_and_values_are_never_seen():
    q, k, v = random_qkv(1, 7, 9, 4, 2, 3, 5)
    o, _ = ops.softmax_attention_forward(q, k, v)
    k[:, 6:] *= 1e3  # 2 past tokens, so query 4 is the first to see key 6
    v[:, 6:] += 1e3
    moved, _ = ops.softmax_attention_forward(q, k, v)
    assert_identical("o", moved[:, :4], o[:, :4])
    assert not np.isclose(moved[:, 4:], o[:, 4:]).all((2, 3)).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_scores_keep_probabilities_that_sum_to_one_in_the_backward_too(dtype):
    # scores about 1e5: one stored log-sum-exp would be rounded by up to 4e-3 in float32, and P with it
    q, k, v = (x.astype(dtype) for x in random_qkv(1, 9, 9, 4, 2, 3, 5))
    q *= 1e5
    v[:] = 1
    o, cache = ops.softmax_attention_forward(q, k, v)
    do = RNG.standard_normal(o.shape).astype(dtype)
    dq, dk, dv = ops.softmax_attention_backward(do, cache)
    tolerance = rounding(32, dtype)  # 9 keys, 18 summands of dv
    assert_within("o", o, np.ones_like(o), tolerance)
    assert_within("sum of dv", dv.sum((1, 2)), do.sum((1, 2)), tolerance * np.abs(do).sum())
    assert np.isfinite(dq).all() and np.isfinite(dk).all()


def test_sigmoid_gate_is_the_product_with_scipys_expit():
    o, gate = RNG.standard_normal((2, 2, 3, 5)) * 9
    expected = o * expit(gate)  # exp(-gate) of up to 27 is rounded 27 times as much
    assert_within("y", ops.sigmoid_gate_forward(o, gate)[0], expected, rounding(2 * (27 + 4)) * np.abs(expected))


@pytest.mark.parametrize(
    "shapes, options, remedy",
    [
        (((1, 4, 6, 3), (1, 4, 4, 3), (1, 4, 4, 3)), {}, "multiple of H_kv"),
        (((1, 4, 6, 3), (1, 3, 2, 3), (1, 3, 2, 3)), {}, "M >= L"),
        (((1, 4, 6, 3), (1, 4, 2, 5), (1, 4, 2, 5)), {}, "do not fit"),
        (((1, 4, 6, 3), (1, 4, 2, 3), (1, 5, 2, 3)), {}, "do not fit"),
        (((1, 4, 6, 3), (1, 5, 2, 3), (1, 5, 2, 3)), {"cu_seqlens": np.array([0, 4])}, "pass one at a time"),
        (((2, 4, 6, 3), (2, 4, 2, 3), (2, 4, 2, 3)), {"cu_seqlens": np.array([0, 4])}, "B = 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_remedy(shapes, options, remedy):
    with pytest.raises(InputError, match=remedy):
        ops.softmax_attention_forward(*map(np.ones, shapes), **options)


def test_a_gate_of_another_shape_is_refused():
    with pytest.raises(InputError, match="must be the same"):
        ops.sigmoid_gate_forward(np.ones((1, 4, 6)), np.ones((1, 4, 1)))
