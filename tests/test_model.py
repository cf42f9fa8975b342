"""The whole model against HF in float64 (committed numbers), and against itself where a claim relates two runs."""

import json
from collections import Counter
from importlib import import_module

import numpy as np
import pytest

import deltanet_ref as dr
from deltanet_ref.model.block import KEEP, block_forward_keeping
from deltanet_ref.model.tensors import expected_tensors, to_gguf_form, v_head_index
from tests.paths import FIXTURES
from tests.tolerances import STORED, assert_close, assert_identical, weight_floors

MODELS = ("eq", "grouped")
every_model = pytest.mark.parametrize("name", MODELS)
every_backend = pytest.mark.parametrize("backend", ["numpy", "numba"])
SEQUENCES = ("t1", "t7", "t64", "t65", "t200")


def gguf(name):
    return FIXTURES / name / f"{name}-f32.gguf"


def hf(name):
    return FIXTURES / name / "hf"


def golden(name, file="hf"):
    return np.load(FIXTURES / name / "golden" / f"{file}.npz")


def tokens(name, case):
    return np.array(json.loads((FIXTURES / name / "golden" / "tokens.json").read_text())[case])[None]


def padded_batch(gold):
    mask = gold["b2/mask"] == 1
    return gold["b2/ids"], np.where(mask, gold["b2/ids"], -100), mask.sum(1)


# Limits, relative. Where both sides compute in float64, what is left is the rounding of the files: most goldens are
# float32 (6e-8; t1, t7 and the losses are not), and a GGUF rounds 1 + w and -exp(A_log) to float32, which moves logits
# by up to 1.4e-7 and gradients by 1e-6 (fixtures/README.md).
STORED64, STORED32, FROM_GGUF, FROM_GGUF_GRADS = 1e-9, 1.5 * STORED["float32"], 3e-7, 3e-6
# float32's noise floors of these models, of the logits and of the gradient of any tensor, held by the next test. They
# count the rounding of the weights; that of the activations, a dozen to a block, makes it 8 floors for a computation.
FLOOR, GRADIENT_FLOOR = 5e-7, 5e-6
FLOAT32 = 8 * FLOOR
# Two float64 computations of the same thing in another order: 8 floors of float64 each.
SAME, SAME_GRADIENT = (2 * 8 * floor * STORED["float64"] / STORED["float32"] for floor in (FLOOR, GRADIENT_FLOOR))


@every_model
def test_the_noise_floors_of_the_models_are_what_the_limits_take_them_for(name):
    def logits(model):
        return [model.logits(tokens(name, case)) for case in SEQUENCES]

    def gradients(model):
        return list(model.loss_and_grads(tokens(name, "t65"), tokens(name, "t65"))[1].values())

    model = dr.load_model(gguf(name), backend="numpy", dtype="float64")
    for results, stated in ((logits, FLOOR), (gradients, GRADIENT_FLOOR)):
        norms = [np.linalg.norm(x) for x in results(model)]
        worst = max(weight_floors(model, results, np.float32) / norms)
        assert stated / 4 < worst < stated, f"{results.__name__}: {worst:.2g}, stated {stated:.2g}"


def tolerances(source, dtype, case):
    if dtype == "float32":
        return FLOAT32, FLOAT32
    if source is gguf:
        return FROM_GGUF, FROM_GGUF
    return (STORED64 if case in ("t1", "t7") else STORED32), STORED64


@every_backend
@every_model
@pytest.mark.parametrize("source, dtype", [(hf, "float64"), (gguf, "float64"), (gguf, "float32"), (hf, "float32")])
def test_logits_hidden_states_and_loss_equal_hf(backend, name, source, dtype):
    model, gold = dr.load_model(source(name), backend=backend, dtype=dtype), golden(name)
    for case in SEQUENCES:
        ids, (tolerance, loss_tolerance) = tokens(name, case), tolerances(source, dtype, case)
        logits = model.logits(ids)
        assert logits.dtype == dtype
        assert_close(f"{case}: logits", logits[0], gold[f"{case}/logits"], tolerance)
        if f"{case}/loss" in gold.files:
            assert abs(model.loss(ids, ids) / float(gold[f"{case}/loss"]) - 1) < loss_tolerance, case
    for case in ("t7", "t65"):
        states = model.hidden_states(tokens(name, case))
        tolerance, _ = tolerances(source, dtype, case)
        for h, key in zip(states, [*(f"h{i}" for i in range(5)), "hnorm"], strict=True):
            assert_close(f"{case}: {key}", h[0], gold[f"{case}/{key}"], tolerance)


@every_backend
@every_model
@pytest.mark.parametrize("source, dtype", [(hf, "float64"), (gguf, "float32")])
def test_right_padding_changes_nothing(backend, name, source, dtype):
    model, gold = dr.load_model(source(name), backend=backend, dtype=dtype), golden(name)
    ids, labels, lengths = padded_batch(gold)
    tolerance, loss_tolerance = tolerances(source, dtype, "b2")
    logits = model.logits(ids, lengths=lengths)
    for row, n in enumerate(lengths):
        assert_close(f"logits of row {row}", logits[row, :n], gold["b2/logits"][row, :n], tolerance)
        assert not logits[row, n:].any()
    assert abs(model.loss(ids, labels, lengths=lengths) / float(gold["b2/loss"]) - 1) < loss_tolerance
    poisoned = np.where(labels == -100, 10**6, ids)  # not even read: no such token exists
    loss, grads = model.loss_and_grads(poisoned, np.where(labels == -100, 7, labels), lengths=lengths)
    clean_loss, clean = model.loss_and_grads(ids, labels, lengths=lengths)
    assert loss == clean_loss
    for tensor in clean:
        assert_identical(tensor, grads[tensor], clean[tensor])


def in_gguf_form(name, gradient, spec, config, ssm_a):
    """An HF gradient with respect to the tensor as GGUF holds it: the same permutation and squeeze, 1 + w moves by
    nothing, and a = -exp(A_log) gives d/da = (d/dA_log) / a."""
    moved = to_gguf_form(gradient, spec._replace(value="squeeze" if spec.value == "squeeze" else "same"), config)
    return moved / ssm_a if spec.value == "minus_exp" else moved


@every_backend
@every_model
@pytest.mark.parametrize("source, tolerance", [(hf, STORED32), (gguf, FROM_GGUF_GRADS)])
def test_gradient_of_every_parameter_equals_hf(backend, name, source, tolerance):
    model, gold = dr.load_model(source(name), backend=backend, dtype="float64"), golden(name, "hf_grads")
    ids = tokens(name, "t65")
    _, grads = model.loss_and_grads(ids, ids)
    specs = expected_tensors(model.config)
    assert set(grads) == set(specs)
    for tensor, spec in specs.items():
        theirs = gold[f"t65/grad/{spec.hf_name}"].astype(np.float64)
        ssm_a = model.weights[tensor] if spec.value == "minus_exp" else None
        assert_close(tensor, grads[tensor], in_gguf_form(name, theirs, spec, model.config, ssm_a), tolerance)
    assert len(specs) == sum(key.startswith("t65/grad/model.") or "lm_head" in key for key in gold.files)


@every_backend
@every_model
@pytest.mark.parametrize("source, tolerance", [(hf, STORED32), (gguf, FROM_GGUF_GRADS)])
def test_gradients_of_an_adapter_equal_peft(backend, name, source, tolerance):
    model, gold = dr.load_model(source(name), backend=backend, dtype="float64"), golden(name, "hf_lora_grads")
    model.attach(dr.load_adapter(FIXTURES / name / "lora.gguf", model))
    by_hf_name = {spec.hf_name: spec for spec in expected_tensors(model.config).values()}
    compared = 0
    for case in sorted({key.split("/")[0] for key in gold.files}):
        batch, lengths = padded_batch(golden(name))[::2] if case == "b2" else (tokens(name, case), None)
        labels = padded_batch(golden(name))[1] if case == "b2" else batch
        _, grads = model.loss_and_grads(batch, labels, lengths=lengths, wrt="lora")
        for key in gold.files:
            if not key.startswith(f"{case}/grad/") or key.endswith("inputs_embeds"):
                continue
            module, side = key.split("/grad/base_model.model.")[1].removesuffix(".weight").rsplit(".lora_", 1)
            module, side = module.removesuffix(".default"), side[0]
            spec = by_hf_name[module + ".weight"]
            theirs = gold[key].astype(np.float64)
            if spec.v_heads and (side == "B") == (spec.v_heads.axis == 0):
                theirs = np.take(theirs, v_head_index(spec, model.config, to="tiled"), axis=spec.v_heads.axis)
            assert_close(key, grads[f"{spec.name}.lora_{side.lower()}"], theirs, tolerance)
            compared += 1
        assert len(grads) == 2 * sum(spec.linear for spec in by_hf_name.values())
    assert compared >= 2 * 62


@every_backend
@every_model
@pytest.mark.parametrize("dtype, tolerance", [("float64", FROM_GGUF), ("float32", FLOAT32)])
def test_logits_with_an_adapter_equal_peft_at_both_scales(backend, name, dtype, tolerance):
    model, gold = dr.load_model(gguf(name), backend=backend, dtype=dtype), golden(name, "hf_lora")
    adapter = dr.load_adapter(FIXTURES / name / "lora.gguf", model)
    for prefix, scale in (("", 1.0), ("half/", 0.5)):
        model.attach(adapter, scale=scale, name="fixture")
        for case in SEQUENCES:
            if f"{prefix}{case}/logits" in gold.files:
                want = gold[f"{prefix}{case}/logits"]
                assert_close(f"{prefix}{case}: logits", model.logits(tokens(name, case))[0], want, tolerance)
        model.detach("fixture")
    case = "t65"
    assert_close(f"{case}: logits", model.logits(tokens(name, case))[0], golden(name)[f"{case}/logits"], tolerance)


@every_backend
@pytest.mark.parametrize("file", ["q8_0", "Q4_K_M"])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 3e-7), ("float32", 2e-5)])
def test_quantised_models_equal_hf_on_the_dequantised_values(backend, file, dtype, tolerance):
    """float32: its noise floor on this model, 3e-6, times six."""
    gold = np.load(FIXTURES / "quant" / "golden.npz")
    model = dr.load_model(FIXTURES / "quant" / f"quant-{file}.gguf", backend=backend, dtype=dtype)
    assert_close("logits", model.logits(gold["t33"][None])[0], gold[f"{file}/hf_f64_dequantised/t33"], tolerance)


@every_backend
@every_model
def test_greedy_continuations_equal_llama_cpp(backend, name):
    model = dr.load_model(gguf(name), backend=backend)
    greedy = json.loads((FIXTURES / name / "golden" / "llama_greedy.json").read_text())["f32/base/"]
    followed = 0
    for case, theirs in greedy.items():
        state = None
        logits, state = model.prefill(tokens(name, case)[0])
        for token, margin in zip(theirs["tokens"], theirs["margin"]):
            if margin < 1e-3:  # a tie at the precision of either side
                break
            assert int(logits.argmax()) == token, case
            logits, state = model.step(token, state)
            followed += 1
    assert followed > 20


@every_backend
# ---- one run against another

@every_model
@pytest.mark.parametrize("split", [1, 3, 64, 65, 199])
def test_prefill_then_steps_equals_the_full_forward(backend, name, split):
    model, ids = dr.load_model(gguf(name), backend=backend, dtype="float64"), tokens(name, "t200")[0]
    full = model.logits(ids[None])[0]
    logits, state = model.prefill(ids[:split])
    assert_close(f"logits of token {split - 1}", logits, full[split - 1], SAME)
    for t in range(split, min(split + 9, 199)):
        logits, state = model.step(ids[t], state)
        assert_close(f"logits of token {t}", logits, full[t], SAME)
    logits, state = model.prefill(ids[state.position :], state)
    assert_close("logits of the last token", logits, full[-1], SAME)


def test_prefill_in_several_passes_equals_one(monkeypatch):
    model, ids = dr.load_model(gguf("grouped"), dtype="float64"), tokens("grouped", "t200")
    whole, _ = model.prefill(ids)
    monkeypatch.setattr("deltanet_ref.model.qwen35.PREFILL_TOKENS", 23)
    pieces, _ = model.prefill(ids)
    assert_close("logits", pieces, whole, SAME)


def test_a_state_can_be_continued_twice():
    model, ids = dr.load_model(gguf("eq")), tokens("eq", "t64")[0]
    _, state = model.prefill(ids[:40])
    first, _ = model.step(ids[40], state)
    model.step(7, state)
    again, _ = model.step(ids[40], state)
    assert_identical("logits", again, first)


@every_model
def test_packed_sequences_equal_separate_runs(name):
    model = dr.load_model(gguf(name), dtype="float64")
    rng = np.random.default_rng(0)
    cu = [0, 1, 6, 73, 93]
    ids, labels = rng.integers(0, 440, (2, 1, 93))
    labels[0, ::5] = -100
    loss, grads = model.loss_and_grads(ids, labels, cu_seqlens=cu)
    logits = model.logits(ids, cu_seqlens=cu)
    total, count, summed = 0.0, 0, {tensor: 0.0 for tensor in grads}
    for a, b in zip(cu, cu[1:]):
        kept = int((labels[0, a + 1 : b] != -100).sum())
        one, its_grads = model.loss_and_grads(ids[:, a:b], labels[:, a:b])
        assert_close(f"logits of tokens {a} .. {b}", logits[:, a:b], model.logits(ids[:, a:b]), SAME)
        total, count = total + kept * one, count + kept
        summed = {tensor: summed[tensor] + kept * its_grads[tensor] for tensor in summed}
    assert_close("loss", loss, total / count, SAME)
    for tensor in grads:
        assert_close(tensor, grads[tensor], summed[tensor] / count, SAME_GRADIENT)


def test_the_first_sequence_does_not_reach_the_second():
    model = dr.load_model(gguf("grouped"))
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 440, (1, 90))
    changed = ids.copy()
    changed[0, :37] = rng.integers(0, 440, 37)
    a, b = (model.logits(x, cu_seqlens=[0, 37, 90]) for x in (ids, changed))
    assert_identical("logits of the second", b[:, 37:], a[:, 37:])
    assert not np.array_equal(a[:, :37], b[:, :37])


def test_nothing_to_train_gives_zero_loss_and_zero_gradients():
    model, ids = dr.load_model(gguf("grouped")), tokens("grouped", "t7")
    loss, grads = model.loss_and_grads(ids, np.full_like(ids, -100))
    assert loss == 0 and set(grads) == set(model.weights) and not any(g.any() for g in grads.values())


def test_the_head_in_blocks_of_the_vocabulary_gives_the_same_loss_and_gradients(monkeypatch):
    model, ids = dr.load_model(gguf("eq"), dtype="float64"), tokens("eq", "t65")
    loss, grads = model.loss_and_grads(ids, ids)
    monkeypatch.setattr("deltanet_ref.ops.linear_cross_entropy.BLOCK", 37)
    blocked, blocked_grads = model.loss_and_grads(ids, ids)
    assert_close("loss", blocked, loss, SAME)
    assert_identical("loss without gradients", model.loss(ids, ids), blocked)
    for tensor in grads:
        assert_close(tensor, blocked_grads[tensor], grads[tensor], SAME_GRADIENT)


# ---- adapters on the model


def random_adapter(model, targets=None, seed=3):
    adapter = dr.new_adapter(model, rank=3, alpha=5, targets=targets, seed=seed)
    rng = np.random.default_rng(seed)
    for name in adapter.tensors:
        adapter.tensors[name] = rng.standard_normal(adapter.tensors[name].shape) * 0.3
    return adapter


def test_several_adapters_add_up_to_their_merged_weights():
    model, ids = dr.load_model(gguf("grouped"), dtype="float64"), tokens("grouped", "t65")
    adapters = {0.5: random_adapter(model, seed=1), -2.0: random_adapter(model, ["ffn_up", "attn_qkv"], seed=2)}
    for scale, adapter in adapters.items():
        model.attach(adapter, scale=scale)
    live = model.logits(ids)
    merged = dr.load_model(gguf("grouped"), dtype="float64")
    for scale, adapter in adapters.items():
        for name in {n.rsplit(".lora_", 1)[0] for n in adapter.tensors}:
            update = adapter.tensors[name + ".lora_b"] @ adapter.tensors[name + ".lora_a"]
            merged.weights[name] = merged.weights[name] + scale * 5 / 3 * update
    assert_close("logits", live, merged.logits(ids), SAME)


def test_gradients_are_those_of_the_trainable_adapter_with_the_others_in_place():
    """Central differences of the loss along a random direction of the factors; h^2 and rounding leave about 3e-8."""
    model, ids = dr.load_model(gguf("grouped"), dtype="float64"), tokens("grouped", "t65")
    model.attach(random_adapter(model, seed=1), scale=0.7)
    trained = random_adapter(model, seed=2)
    model.attach(trained, trainable=True)
    _, grads = model.loss_and_grads(ids, ids, wrt="lora")
    assert set(grads) == set(trained.tensors)
    rng = np.random.default_rng(4)
    start = dict(trained.tensors)
    direction = {name: rng.standard_normal(x.shape) for name, x in start.items()}
    h, losses = 1e-7, []
    for sign in (1, -1):
        trained.tensors.update({name: x + sign * h * direction[name] for name, x in start.items()})
        losses.append(model.loss(ids, ids))
    slope = sum((grads[name] * direction[name]).sum() for name in grads)
    assert abs((losses[0] - losses[1]) / (2 * h) / slope - 1) < 1e-6


@pytest.mark.parametrize(
    "targets", [["ssm_alpha"], ["ffn_down"], ["attn_k"], ["blk.2.ffn_gate.weight"], ["blk.3.attn_output.weight"]]
)
def test_an_adapter_on_a_few_tensors_gets_the_gradients_of_one_on_all(targets):
    """Backward ends at the lowest adapted block: what is left out must not change what is kept."""
    model, ids = dr.load_model(gguf("grouped"), dtype="float64"), tokens("grouped", "t65")
    few, every = random_adapter(model, targets), random_adapter(model)
    for name in every.tensors:
        every.tensors[name] = few.tensors.get(name, np.zeros_like(every.tensors[name]))
    model.attach(few, name="x")
    _, got = model.loss_and_grads(ids, ids, wrt="lora")
    model.detach("x")
    model.attach(every, name="x")
    _, exact = model.loss_and_grads(ids, ids, wrt="lora")
    assert set(got) == set(few.tensors)
    for name in got:
        assert_close(name, got[name], exact[name], SAME_GRADIENT)


def test_backward_of_lora_touches_nothing_below_the_lowest_adapted_block(monkeypatch):
    model, ids = dr.load_model(gguf("grouped")), tokens("grouped", "t65")
    model.attach(random_adapter(model, ["blk.2.ffn_up.weight"]))
    visited = []
    linear = import_module("deltanet_ref.backends.numba_cpu.linear")  # what lora_backward multiplies with
    for module, op in [
        (module, f"linear_backward_{to}") for module in (model.backend, linear) for to in ("input", "weight")
    ] + [(model.backend, "gated_delta_rule_backward"), (model.backend, "embedding_backward")]:

        def counted(*args, _op=op, _original=getattr(module, op), **options):
            visited.append(_op)
            return _original(*args, **options)

        monkeypatch.setattr(module, op, counted)
    model.loss_and_grads(ids, ids, wrt="lora")
    # the head: softmax times its rows; block 3 (attention): 4 projections and 3 of the feed-forward; block 2: ffn_down,
    # then db, da of ffn_up and what leads there
    assert Counter(visited) == {"linear_backward_input": 1 + 7 + 1 + 1, "linear_backward_weight": 2}


# ---- less memory between forward and backward


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("wrt", ["all", "lora"])
def test_what_is_kept_for_the_backward_does_not_change_a_bit(backend, wrt):
    model = dr.load_model(gguf("grouped"), backend=backend)
    for seed in (1, 2):
        model.attach(
            random_adapter(model, ["ffn_up", "ffn_down", "attn_qkv", "ssm_beta", "attn_q"][seed:], seed=seed),
            trainable=seed == 2,
        )
    ids = np.random.default_rng(0).integers(0, 440, (1, 93))
    (loss, grads), *others = (
        model.loss_and_grads(ids, ids, cu_seqlens=[0, 1, 6, 93], wrt=wrt, keep=keep) for keep in KEEP
    )
    for other_loss, other in others:
        assert other_loss == loss and other.keys() == grads.keys()
        for name in grads:
            assert_identical(name, other[name], grads[name])


def arrays_in(x):
    """The arrays in nested tuples, lists and dicts."""
    if isinstance(x, np.ndarray):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
    return [array for part in parts for array in arrays_in(part)]


@every_model
def test_kept_are_the_numbers_that_the_table_counts(name):
    """model/block.py's table, by distinct memory; the adapter is rank 3 on every linear map."""
    model, L = dr.load_model(gguf(name)), 65
    c = model.config
    model.attach(random_adapter(model))
    x, options = np.zeros((1, L, c.hidden_size), np.float32), dict(shared=model._shared(np.arange(L)), cu_seqlens=None)
    for layer in model.layers:
        if c.layer_types[layer.index] == "full_attention":
            mixer = 2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads) + 3 * 4
        else:
            mixer = (
                2 * c.linear_num_key_heads * c.linear_key_head_dim
                + 2 * c.linear_num_value_heads * (c.linear_value_head_dim + 1)
                + 3 * 5
            )
        counts = {"inputs": c.hidden_size, "products": 2 * c.hidden_size + mixer + 2 * c.intermediate_size + 3 * 3}
        for keep, count in counts.items():
            kept = block_forward_keeping(keep, x, layer, **options)[1]
            held = {
                id(array): array
                for array in arrays_in(
                    (kept.x, [(results or [], cache.lora.h) for results, cache in kept.products.values()])
                )
            }
            assert sum(array.size for array in held.values()) == count * L, (layer.index, keep)


def test_with_products_kept_no_product_with_a_weight_is_computed_twice(monkeypatch):
    model, ids, products = dr.load_model(gguf("grouped")), tokens("grouped", "t65"), []
    original = model.backend.linear_forward
    monkeypatch.setattr(model.backend, "linear_forward", lambda x, w: products.append(w.shape) or original(x, w))
    counts = {}
    for keep in KEEP:
        products.clear()
        model.loss_and_grads(ids, ids, keep=keep)
        counts[keep] = len(products)
    assert counts["products"] == counts["everything"] == 3 * 8 + 7
    assert counts["inputs"] == 2 * counts["everything"] - len(model.layers)  # ffn_down's is not needed


# ---- requests that make no sense


def test_bad_requests_are_refused_with_the_remedy():
    model = dr.load_model(gguf("eq"))
    ids = tokens("eq", "t7")
    for call, message in [
        (lambda: model.logits(ids + 480), "outside the vocabulary of 480"),
        (lambda: model.logits(ids[0]), "shape .B, L."),
        (lambda: model.logits(ids, lengths=[8]), "from 0 to 7"),
        (lambda: model.logits(ids, lengths=[3], cu_seqlens=[0, 7]), "not both"),
        (lambda: model.loss(ids, ids[:, :3]), "aligned"),
        (lambda: model.loss_and_grads(ids, ids, wrt="lora"), "0 are attached"),
        (lambda: model.loss_and_grads(ids, ids, wrt="base"), "'all'"),
        (lambda: model.loss_and_grads(ids, ids, keep="all"), "'everything', 'products', 'inputs'"),
        (lambda: model.detach("x"), "attached: none"),
        (lambda: model.attach(random_adapter(dr.load_model(gguf("grouped")))), "made for another base"),
        (lambda: dr.load_model(gguf("eq"), backend="metal"), "not in this version"),
        (lambda: dr.load_model(gguf("eq"), dtype="bfloat16"), "float32"),
    ]:
        with pytest.raises(dr.InputError, match=message):
            call()
