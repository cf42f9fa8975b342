"""The catalogue as code: every mutant is caught, and its mistake is recognised by another realisation of it.

Nothing here is compared with itself: a mutant of one realisation, at seeds and in a layout that the vectors do not
have, is ranked by the other one (oracle/mutants/confusion.py); the kernels of tests/oracle_kernels.py share no code
with either.
"""

import functools

import numpy as np
import pytest

from deltanet_ref import ops
from deltanet_ref.oracle.cases import CASES, make_inputs
from deltanet_ref.oracle.catalogue import CATALOGUE
from deltanet_ref.oracle.check import examine, judge
from deltanet_ref.oracle.compare import noise_multiples
from deltanet_ref.oracle.expected import expected
from deltanet_ref.oracle.layouts import Layout
from deltanet_ref.oracle.mutants import BACKWARD, FORWARD, answers
from deltanet_ref.oracle.mutants.confusion import TURNED, Mutant, cases_for, row, trial
from deltanet_ref.oracle.mutants.forms import FORMS
from deltanet_ref.oracle.mutants.mutations import Mutation, rule
from deltanet_ref.oracle.noise import FACTOR, relative_error
from deltanet_ref.oracle.operators import OPERATORS, in_dtype
from tests.oracle_kernels import chunked_forward, loop_backward, loop_forward
from tests.test_oracle_check import DENSE

NOT_OF_AN_OPERATOR = {23: "exporting an adapter", 25: "a compiler", 26: "a GPU's index or grid", 31: "which path ran"}


# ---- the table


def test_the_table_is_as_large_as_the_catalogue_asks_for():
    assert len(FORWARD) >= 45 and len(BACKWARD) >= 45
    assert {mistake.bug for mistake in FORWARD + BACKWARD} == CATALOGUE.keys() - NOT_OF_AN_OPERATOR.keys()


def test_realisations_differ_and_titles_are_unique():
    assert all(mistake.a != mistake.b for mistake in FORWARD + BACKWARD)
    for table in FORWARD, BACKWARD:
        titles = [(mistake.title, mistake.a.ops) for mistake in table]
        assert len(set(titles)) == len(titles)


def test_a_change_of_a_step_that_the_form_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="rule has no Gamma, nothing"):
        rule(nothing=lambda: 0, Gamma=lambda: 0, S_next=lambda S_next: S_next)


# ---- the forms themselves

CHUNKS = {"rule": (64,), "chunks": (64, 20, 1), "padded": (64, 20)}
ON_EVERY_CASE = [
    (form, chunk, case)
    for form, (_, names) in FORMS.items()
    for chunk in CHUNKS.get(form, (64,))
    for case in CASES.values()
    if case.op in names and "long" not in case.flags
]


@pytest.mark.parametrize("form, chunk, case", ON_EVERY_CASE, ids=[f"{f}-{n}-{c.id}" for f, n, c in ON_EVERY_CASE])
def test_every_form_equals_ops_in_float64(form, chunk, case):
    """Packed sequences, tiled heads, short chunks and states included.

    Delta rule: 1e-12 of the terms that were summed, since a chunk's sum of log decays, up to 64 * 128, is exact to
    2^-53 of itself and its exponential to 64 * 128 * 2^-53 = 0.9e-12. Other operators: 16 times the noise floor of the
    case, measured in float32 and multiplied by the ratio of the roundoffs, as the kit judges at float64.
    """
    x = in_dtype(make_inputs(case), np.float64) | {k: v for k, v in case.options.items() if k == "head_order"}
    right = OPERATORS[case.op].reference(x)
    found = answers(Mutation(form, chunk=chunk), case, x, gradients=True)
    for name, want in right.items():
        assert found[name].shape == want.shape, name
        if form in CHUNKS:
            error, limit = relative_error(found[name], want, expected(case).scales[name]).max(), 1e-12
        else:
            error, limit = noise_multiples(found[name], want, expected(case), name, "float64").max(), FACTOR["float64"]
        assert error <= limit, f"{name} differs by {error:.3g}, limit {limit:g}"


def test_mutants_do_not_depend_on_the_code_of_ops(monkeypatch):
    """A refactoring of ops cannot break them: no function of ops is called."""
    one_of_each = {mistake.a.form: mistake.a for mistake in (*FORWARD, *BACKWARD)}
    one_of_each |= {mistake.b.form: mistake.b for mistake in (*FORWARD, *BACKWARD)}
    assert one_of_each.keys() == FORMS.keys()
    case = {name: next(case for case in CASES.values() if case.op == names[0]) for name, (_, names) in FORMS.items()}
    before = {form: answers(one_of_each[form], case[form], make_inputs(case[form]), True) for form in FORMS}

    def unusable(*args, **options):
        raise AssertionError("ops was called")

    modules = [value for value in vars(ops).values() if getattr(value, "__name__", "").startswith("deltanet_ref.ops.")]
    for module in (ops, *modules):
        for name, value in vars(module).copy().items():
            if callable(value):
                monkeypatch.setattr(module, name, unusable)
    for form in FORMS:
        after = answers(one_of_each[form], case[form], make_inputs(case[form]), True)
        for name in OPERATORS[case[form].op].outputs:
            np.testing.assert_array_equal(after[name], before[form][name])


# ---- every mutant caught, and recognised by the other realisation


@pytest.mark.parametrize("realisation", "ab")
@pytest.mark.parametrize("table", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_every_mutant_is_caught_and_nearly_all_are_among_the_first_three_suspects(table, realisation):
    """Measured: all 440 are among the first three, 437 first."""
    trials = [trial(mistake, realisation) for mistake in table]
    print("\n".join(map(row, trials)))
    assert [t.mistake.title for t in trials if not t.failed] == []
    named = np.mean([t.place is not None and t.place <= 3 for t in trials])
    first = np.mean([t.place == 1 for t in trials])
    assert named >= 0.97 and first >= 0.95


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_form_unchanged_raises_no_alarm(form, dtype):
    """So the change alone is caught. In chunks of 20 tokens too, and in the layout of the mutants."""
    op = FORMS[form][1][0]
    layout = TURNED if op == "gated_delta_rule" else Layout()
    for chunk in CHUNKS.get(form, (64,)):
        report = examine(Mutant(Mutation(form, chunk=chunk), gradients=True), cases_for(op), dtype=dtype, layout=layout)
        assert report.ok and report.suspects == []


@pytest.mark.parametrize("form", ["rule", "chunks", "padded"])
def test_rounded_operands_and_a_half_precision_state_are_caught_where_float32_is_claimed(form):
    """In nearly every case, and no other mistake is named."""
    controls = [
        (mistake.bug, mutation)
        for mistake in FORWARD
        for mutation in (mistake.a, mistake.b)
        if mistake.bug in (18, 19) and mutation.form == form and "between" not in mistake.title
    ]
    assert controls
    for bug, mutation in controls:
        report = examine(
            Mutant(mutation, gradients=False), cases_for("gated_delta_rule"), dtype="float32", layout=TURNED
        )
        assert len(report.failed) > 0.8 * len(report.cases)
        assert {18, 19} >= {suspect for suspect, _, _ in report.suspects} >= {bug}


# ---- mistakes in code that is independent of the catalogue

LOOP_FORWARD = {
    "read before write": 28,
    "error before decay": 28,
    "row 0's state for every row": 4,
    "beta at most 1": 27,
    "keys normalised inside": 8,
    "keys normalised inside, 0/0": 8,
    "forgets at chunk borders": 4,
    "decay clamped": 5,
    "half precision state": 18,
    "tail of 16 not written": 13,
    "heads modulo": 2,
}
LOOP_BACKWARD = {
    "dS_end ignored": 14,
    "dq without scale": 7,
    "dv without beta": 11,
    "dbeta without the read": 11,
    "dk without the erased part": 11,
    "dS not through the erased part": 11,
    "dg without the decay": 6,
    "dS not decayed at chunk borders": 29,
    "dS0 lost": 14,
    "dg of the second row from the first": 15,
    "one value head per key head": 2,
    "dq and dk swapped": 32,
}
CHUNKED = {
    "A without Gamma": 10,
    "T = I - A": 10,
    "W without decay": 10,
    "0/1 mask": 10,
    "decay not carried": 29,
    "V_new plus W S": 10,
}


def first_suspect(forward, backward=None):
    return judge(forward, backward, cases=DENSE).suspects[0][0]


@pytest.mark.parametrize("mistake", LOOP_FORWARD)
def test_a_mistake_of_a_loop_over_tokens_is_named(mistake):
    assert first_suspect(functools.partial(loop_forward, mistake=mistake)) == LOOP_FORWARD[mistake]


@pytest.mark.parametrize("mistake", CHUNKED)
def test_a_mistake_of_a_chunked_kernel_is_named(mistake):
    assert (
        first_suspect(lambda *x, **options: chunked_forward(*x, chunk=40, mistake=mistake, **options)[:2])
        == CHUNKED[mistake]
    )


@pytest.mark.parametrize("mistake", LOOP_BACKWARD)
def test_a_mistake_of_a_backward_is_named(mistake):
    backward = functools.partial(loop_backward, mistake=mistake)
    assert first_suspect(loop_forward, backward) == LOOP_BACKWARD[mistake]


# ---- failures that no known mistake explains


def noisy(x):
    return x + np.float32(1e-3) * np.random.default_rng(7).standard_normal(x.shape).astype(np.float32)


UNKNOWN = {
    "o is 1 percent too large": ("o", lambda x: x * np.float32(1.01)),
    "o is a token late": ("o", lambda x: np.roll(x, 1, 1)),
    "o of the heads in reverse": ("o", lambda x: x[:, :, ::-1]),
    "o without its last feature": ("o", lambda x: x * (np.arange(x.shape[3]) < x.shape[3] - 1)),
    "o with noise": ("o", noisy),
    "every seventh o is halved": ("o", lambda x: x * np.where(np.arange(x.shape[1]) % 7 == 6, 0.5, 1)[:, None, None]),
    "S_end negative": ("S_end", np.negative),
    "S_end by a feature off": ("S_end", lambda x: np.roll(x, 1, 2)),
    "S_end with noise": ("S_end", noisy),
    "dq is a token late": ("dq", lambda x: np.roll(x, 1, 1)),
    "dk negative": ("dk", np.negative),
    "dv is 50 percent too large": ("dv", lambda x: x * 1.5),
    "dg with noise": ("dg", noisy),
    "dbeta is a token late": ("dbeta", lambda x: np.roll(x, 1, 1)),
    "dS0 is twice as large": ("dS0", lambda x: 2 * x),
}


@pytest.mark.parametrize("failure", UNKNOWN)
def test_an_unknown_failure_has_a_stage_and_no_suspect(failure):
    stage, spoil = UNKNOWN[failure]

    def spoilt(names, values):
        return tuple(spoil(x).astype(x.dtype) if name == stage else x for name, x in zip(names, values))

    report = judge(
        lambda *x, **options: spoilt(("o", "S_end"), loop_forward(*x, **options)),
        lambda *x, **options: spoilt(("dq", "dk", "dv", "dg", "dbeta", "dS0"), loop_backward(*x, **options)),
        cases=DENSE,
    )
    assert len(report.failed) > len(report.cases) / 2
    assert report.first_stage()[0] == stage
    assert report.suspects == []
