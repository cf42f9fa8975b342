"""The catalogue as code: every mutant is caught, and a mistake is known by another realisation of it than its own.

Nothing here is compared with itself: a mutant of one realisation, at seeds and in a layout that the vectors do not have,
is ranked by the other one (oracle/mutants/confusion.py); the kernels of tests/oracle_kernels.py share no code with either.
"""
import functools

import numpy as np
import pytest

from deltanet_ref.oracle.catalogue import CATALOGUE
from deltanet_ref.oracle.check import examine, judge
from deltanet_ref.oracle.layouts import Layout
from deltanet_ref.oracle.mutants import BACKWARD, FORWARD
from deltanet_ref.oracle.mutants.confusion import TURNED, Mutant, cases_for, row, trial
from deltanet_ref.oracle.mutants.edits import BASES, Edit, made, rule
from tests.oracle_kernels import chunked_forward, loop_backward, loop_forward
from tests.test_oracle_check import DENSE

NOT_OF_AN_OPERATOR = {23: "exporting an adapter", 25: "a compiler", 26: "a GPU's index or grid", 31: "which path ran"}


# ---- the table

def test_the_table_is_as_large_as_the_catalogue_asks_for():
    assert len(FORWARD) >= 45 and len(BACKWARD) >= 45
    assert {mistake.bug for mistake in FORWARD + BACKWARD} == CATALOGUE.keys() - NOT_OF_AN_OPERATOR.keys()


def test_no_mistake_has_twice_the_same_realisation_and_none_has_another_ones_title():
    assert all(mistake.a != mistake.b for mistake in FORWARD + BACKWARD)
    for table in FORWARD, BACKWARD:
        titles = [(mistake.title, BASES[mistake.a.base].ops) for mistake in table]
        assert len(set(titles)) == len(titles)


def test_words_that_the_code_does_not_have_once_are_an_error():
    for words in "no such words", "args":
        with pytest.raises(ValueError, match=f"rule has '{words}' (0|[0-9][0-9]+) times"):
            made(rule((words, "something else")))


# ---- every mutant caught, and told by the other realisation

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


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_code_unchanged_raises_no_alarm(base, dtype):
    """So it is the change alone that is caught; chunks of 20 tokens too, in the layout of the mutants."""
    op = BASES[base].ops[0]
    layout = TURNED if op == "gated_delta_rule" else Layout()
    for chunk in (64, 20) if BASES[base].chunk else (64,):
        report = examine(Mutant(Edit(base, (), chunk), gradients=True), cases_for(op), dtype=dtype, layout=layout)
        assert report.ok and report.suspects == []


@pytest.mark.parametrize("base", ["rule", "chunks", "wy"])
def test_rounded_operands_and_a_half_precision_state_are_caught_where_float32_is_claimed(base):
    """In every case with more than pencil and paper, and nothing else is named."""
    controls = [(mistake.bug, edit) for mistake in FORWARD for edit in (mistake.a, mistake.b)
                if mistake.bug in (18, 19) and edit.base == base and "between" not in mistake.title]
    assert controls
    for bug, edit in controls:
        report = examine(Mutant(edit, gradients=False), cases_for("gated_delta_rule"), dtype="float32", layout=TURNED)
        assert len(report.failed) > 0.8 * len(report.cases)
        assert {18, 19} >= {suspect for suspect, _, _ in report.suspects} >= {bug}


# ---- mistakes in code that knows nothing of the catalogue

LOOP_FORWARD = {"read before write": 28, "error before decay": 28, "row 0's state for every row": 4, "beta at most 1": 27,
                "keys normalised inside": 8, "keys normalised inside, 0/0": 8, "forgets at chunk borders": 4,
                "decay clamped": 5, "half precision state": 18, "tail of 16 not written": 13, "heads modulo": 2}
LOOP_BACKWARD = {"dS_end ignored": 14, "dq without scale": 7, "dv without beta": 11, "dbeta without the read": 11,
                 "dk without the erased part": 11, "dS not through the erased part": 11, "dg without the decay": 6,
                 "dS not decayed at chunk borders": 29, "dS0 lost": 14, "dg of the second row from the first": 15,
                 "one value head per key head": 2, "dq and dk swapped": 32}
CHUNKED = {"A without Gamma": 10, "T = I - A": 10, "W without decay": 10, "0/1 mask": 10, "decay not carried": 29,
           "V_new plus W S": 10}


def first_suspect(forward, backward=None):
    return judge(forward, backward, cases=DENSE).suspects[0][0]


@pytest.mark.parametrize("mistake", LOOP_FORWARD)
def test_a_mistake_of_a_loop_over_tokens_is_named(mistake):
    assert first_suspect(functools.partial(loop_forward, mistake=mistake)) == LOOP_FORWARD[mistake]


@pytest.mark.parametrize("mistake", CHUNKED)
def test_a_mistake_of_a_chunked_kernel_is_named(mistake):
    assert first_suspect(lambda *x, **options: chunked_forward(*x, chunk=40, mistake=mistake, **options)[:2]) == \
        CHUNKED[mistake]


@pytest.mark.parametrize("mistake", LOOP_BACKWARD)
def test_a_mistake_of_a_backward_is_named(mistake):
    backward = functools.partial(loop_backward, mistake=mistake)
    assert first_suspect(loop_forward, backward) == LOOP_BACKWARD[mistake]


# ---- what nobody knows

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

    report = judge(lambda *x, **options: spoilt(("o", "S_end"), loop_forward(*x, **options)),
                   lambda *x, **options: spoilt(("dq", "dk", "dv", "dg", "dbeta", "dS0"), loop_backward(*x, **options)),
                   cases=DENSE)
    assert len(report.failed) > len(report.cases) / 2
    assert report.first_stage()[0] == stage
    assert report.suspects == []
