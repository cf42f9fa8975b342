"""Which known mistakes explain a failure. Three kinds of evidence, the strongest first:

value  a mutant gives the same wrong numbers in the same cases as the implementation
size   a mutant has errors of the same size in the same cases and outputs; for mistakes whose numbers depend on the
       implementation (rounding, overflow, uninitialised memory)
place  the failing cases and rows are exactly those that a mistake can affect: the cases with one flag, the rows after
       the first, short chunks

If an output is wrong, only outputs are compared, because the gradients of a wrong forward say little; else gradients.
"""

import functools

import numpy as np

from deltanet_ref.oracle.cases import make_inputs
from deltanet_ref.oracle.catalogue import CATALOGUE
from deltanet_ref.oracle.compare import noise_multiples
from deltanet_ref.oracle.flags import FLAGS
from deltanet_ref.oracle.layouts import Layout, put, rule_inputs, take, through_norms
from deltanet_ref.oracle.mutants import answers, mistakes_of
from deltanet_ref.oracle.mutants.forms import DELTA
from deltanet_ref.oracle.noise import FACTOR
from deltanet_ref.oracle.operators import OPERATORS, held_in, in_dtype

CHUNKS = (16, 32, 64, 128)  # chunk sizes to try; the implementation does not report its own
UNUSUAL_CHUNKS = (4, 8, 10, 20, 24, 40, 48, 80, 96, 100)  # tried when nothing fits with those
LONGEST = 200  # tokens; mutants do not run on longer cases
FIRST, FAILING, PASSING = 4, 10, 6  # failing cases for every mutant; cases for those that fit there
LIKELY, SIZE_LIKELY = 0.5, 0.6  # share of the wrong elements that a suspect must explain
ALWAYS = 0.75  # share of one output that must be explained for the output to count
EXPLAINED = 0.05  # an error is explained if at most this part of it remains
LARGEST = 2.0**30  # noise floors up to which errors are compared
AS_LARGE = 2.0  # bits by which the errors of one mistake vary between implementations
NEARLY = 0.85  # share of the cases with a property that must fail for it to be the reason
ROUNDING, ROUNDINGS = 2.0**-6, (18, 19, 34)  # largest relative error of rounding to bfloat16; mistakes that round
DECAYS = (5, 6)  # of strong decay: errors of any size
PLACE = 0.45  # score of an exact match of place, below any match of numbers


# numbers, title, property of a case of the delta rule and its inputs; for mistakes whose numbers vary too much
PROPERTIES = (
    ((17, 27), "only cases with beta = 0 fail", lambda case, x: (x["beta"] == 0).any()),
    ((27,), "only cases with beta at 1 or above fail", lambda case, x: (x["beta"] >= 1).any()),
    ((27,), "only cases with beta at 0, 1 or 2 fail", lambda case, x: np.isin(x["beta"], (0, 1, 2)).any()),
    ((12,), "only cases without any decay fail", lambda case, x: not x["g"].any()),
    ((5, 6), "only cases with strong decay fail", lambda case, x: x["g"].min() <= -20),
    ((4, 3, 14), "only cases with an initial state fail", lambda case, x: x["S0"].any()),
    ((14,), "only cases with a gradient of the final state fail", lambda case, x: x["dS_end"].any()),
    ((15,), "only cases of several rows fail", lambda case, x: case.sizes["B"] > 1),
    ((2,), "only cases of several key heads fail", lambda case, x: case.sizes["H_k"] > 1),
    ((8,), "only keys that are not unit vectors fail", lambda case, x: abs(np.square(x["k"]).sum(-1) - 1).max() > 0.1),
    (
        (7,),
        "only scales other than d_k ** -0.5 fail",
        lambda case, x: abs(x["scale"] ** 2 * case.sizes["d_k"] - 1) > 1e-6,
    ),
)


def rank(report, realisations="ab"):
    """Suspects as [(number in catalogue.py, title, score)], the likeliest first; empty if no known mistake fits.

    report        check.ConformanceReport
    realisations  "a", "b" or both: the mutants of each mistake to compare with
    score         at most 1, when every wrong element is explained
    """
    best = {}
    for op in dict.fromkeys(result.case.op for result in report.failed):
        results = [result for result in report.cases if result.case.op == op and result.stages]
        for score, bug, title in _Failure(op, results, report).suspects(realisations):
            if score > best.get(bug, (0.0, ""))[0]:
                best[bug] = score, title
    ranked = sorted(best, key=lambda bug: -best[bug][0])
    return [(bug, f"{CATALOGUE[bug].title}: {best[bug][1]}", round(best[bug][0], 3)) for bug in ranked]


class _Failure:
    """The cases of one operator, and which of their outputs (or gradients, if the outputs are right) to compare."""

    def __init__(self, op, results, report):
        outputs = OPERATORS[op].outputs
        self.op, self.results, self.dtype, self.layout = op, results, report.dtype, report.layout
        self.backward = not any(_bad(result, outputs) for result in results)
        # no mistake leaves out an output, but some leave out a gradient
        judged = {
            name
            for result in results
            for name, stage in result.stages.items()
            if stage.status != "MISSING" or name in OPERATORS[op].gradients
        }
        self.names = tuple(name for name in (OPERATORS[op].gradients if self.backward else outputs) if name in judged)
        self.failing = [result for result in results if _bad(result, self.names)]
        self.passing = [result for result in results if not _bad(result, self.names)]

    def suspects(self, realisations):
        """[(score, bug, title)] of the likely ones."""
        # of mistakes that fit equally well, those of the recurrence come before those of a chunked form
        table = sorted(mistakes_of(self.op)[self.backward], key=lambda mistake: mistake.a.form != "rule")
        failing = _varied(self.failing, FAILING)
        cases = failing + _varied(self.passing, PASSING)

        def rated(by, agreement, *first, chunks=CHUNKS, likely=LIKELY):
            """Mistakes whose mutants agree on all cases; one that disagrees on the first is not run on the rest."""
            for mistake in table:
                mutants = [
                    mutant
                    for name in realisations
                    for mutant in _of_every_chunk(getattr(mistake, name), chunks)
                    if mistake.by == by and all(agreement(mutant, part) > likely / 2 for part in first)
                ]
                score = max((agreement(mutant, cases) for mutant in mutants), default=0.0)
                if score >= likely:
                    yield score, mistake.bug, mistake.title

        first, rounding = (failing[:1], failing[:FIRST]), self.rounding()
        return (
            list(rated("value", self.same_numbers, *first))
            or not rounding
            and list(rated("value", self.same_numbers, *first, chunks=UNUSUAL_CHUNKS))
            or self.backward
            and [
                (score, bug, f"{title}, but with the wrong sign or twice")
                for score, bug, title in rated("value", self.opposite_numbers, *first)
            ]
            or list(rated("size", self.same_sizes, likely=SIZE_LIKELY))
            or self.places(
                {
                    bug
                    for bug in {26, *(mistake.bug for mistake in table)}  # 26 is the GPU's alone
                    if bug in DECAYS or (bug in ROUNDINGS) == rounding
                }
            )
        )

    def opposite_numbers(self, mutant, results):
        """same_numbers with the missing term subtracted once more: gradients are linear in most terms, so this is what
        a wrong sign gives."""
        return self.same_numbers(mutant, results, times=2)

    def same_numbers(self, mutant, results, times=1):
        """The share of the elements wrong on either side that have the same value on both, averaged over outputs.

        An output that agrees in some cases only is not explained by the mutant and counts as 0.
        times  factor of the mutant's error
        """
        counts = {name: [] for name in self.names}
        for result in results:
            answer = _answers(mutant, result.case, self.layout, self.dtype, self.backward)
            for name in self.names:
                same, wrong = self.counts(result, name, answer.get(name), times)
                if wrong:
                    counts[name].append((same, wrong))
        parts = []
        for same, wrong in (np.array(of_cases).T for of_cases in counts.values() if of_cases):
            part = min(np.mean(same / wrong), same.sum() / wrong.sum())
            parts.append(part if part >= ALWAYS else 0.0)
        return float(np.mean(parts)) if parts else 0.0

    def counts(self, result, name, theirs, times):
        """(same, wrong): the number of elements wrong here or in the mutant, and how many of them agree."""
        right = result.expected.values[name]
        ours = result.outputs.get(name)
        ours, theirs = (0 * right if y is None else np.asarray(y, np.float64) for y in (ours, theirs))
        if ours.shape != right.shape:
            return right.size * (ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-3)), right.size
        if theirs.shape != right.shape:
            return 0, right.size
        with np.errstate(invalid="ignore", over="ignore"):
            theirs = right + times * (theirs - right) if times > 1 else theirs
        limit = FACTOR[self.dtype]
        error, its_error, apart = (
            noise_multiples(y, want, result.expected, name, self.dtype)
            for y, want in ((ours, right), (theirs, right), (ours, theirs))
        )
        same = np.isfinite(error) & (apart <= np.maximum(EXPLAINED * error, np.minimum(limit, error / 4)))
        same |= np.isinf(error) & np.isinf(its_error)
        wrong = (error > limit) | (its_error > limit)
        return (same & wrong).sum(), wrong.sum()

    def same_sizes(self, mutant, results):
        """1 - mean |log2(error) - log2(mutant's error)| / (2 AS_LARGE), over outputs that either gets wrong."""
        distances = []
        for result in results:
            answer = _answers(mutant, result.case, self.layout, self.dtype, self.backward)
            for name in self.names:
                right, theirs = result.expected.values[name], answer.get(name)
                error = result.stages[name].error if name in result.stages else np.nan
                if theirs is None or theirs.shape != right.shape or not error >= 0:
                    return 0.0
                its_error = noise_multiples(theirs, right, result.expected, name, self.dtype).max(initial=0.0)
                if max(error, its_error) > FACTOR[self.dtype]:
                    ours, theirs = (np.log2(np.clip(e, 1.0, LARGEST)) for e in (error, its_error))
                    distances.append(abs(ours - theirs))
        return 1.0 - float(np.mean(distances)) / (2 * AS_LARGE) if distances else 0.0

    def rounding(self):
        """Whether all errors are small enough to be rounding."""
        precision = "bfloat16" if self.dtype == "bfloat16" else "float32"
        return all(
            stage.error * result.expected.floors[name][precision] < ROUNDING
            for result in self.failing
            for name, stage in result.stages.items()
            if name in self.names
        )

    def places(self, possible):
        """Suspects among these numbers by place: nearly all cases with a property fail, and none without it."""
        found = []
        inputs = [make_inputs(result.case) for result in self.results]
        for bugs, title, has_it in self.properties():
            failed = {True: [], False: []}
            for result, x in zip(self.results, inputs):
                failed[bool(has_it(result.case, x))].append(_bad(result, self.names))
            if min(map(len, failed.values())) >= 2 and np.mean(failed[True]) > NEARLY and not any(failed[False]):
                found += [(PLACE * float(np.mean(failed[True])), bug, title) for bug in bugs if bug in possible]
        firsts = [
            stage.first_bad
            for result in self.failing
            for name, stage in result.stages.items()
            if name in self.names and stage.first_bad
        ]
        if firsts and all(place.get("sequence") for place in firsts):  # never None or 0
            bugs = {bug for result in self.failing for bug in ((1, 4) if result.case.options.get("lengths") else (15,))}
            found += [
                (PLACE, bug, "only rows and sequences after the first are wrong")
                for bug in sorted(bugs & possible)[::-1]
            ]
        if any(self.shuffled(result) for result in self.failing):
            found.append((1.0, 32, "the shapes are those of other outputs"))
        return found

    def shuffled(self, result):
        """Whether several shapes are wrong but would be right in another order."""
        names = [name for name in self.names if name in result.stages and result.stages[name].status == "SHAPE"]
        shapes = ([x[name].shape for name in names] for x in (result.outputs, result.expected.values))
        return len(names) > 1 and len(set(map(str, map(sorted, shapes)))) == 1

    def properties(self):
        """(numbers, title, property of a case and its inputs) that distinguish mistakes."""
        if self.op in DELTA:
            yield from PROPERTIES
        for flag in dict.fromkeys(flag for result in self.results for flag in result.case.flags):
            yield FLAGS[flag].bugs, f"only cases with {flag} fail", lambda case, x, flag=flag: flag in case.flags
        for C in CHUNKS:
            yield (13,), f"only chunks of {C} that are not full fail", lambda case, x, C=C: case.sizes.get("L", C) % C
            yield (
                (29, 4, 11),
                f"only cases of several chunks of {C} fail",
                lambda case, x, C=C: case.sizes.get("L", C) > C,
            )


def _bad(result, names):
    return any(name in names and stage.status != "ok" for name, stage in result.stages.items())


def _varied(results, n):
    """Up to n cases with different flags, short to long; hand-computable ones last, since they distinguish little."""
    chosen, seen = [], set()
    for result in sorted(
        (result for result in results if result.case.sizes.get("L", 1) <= LONGEST),
        key=lambda result: ("hand-computable" in result.case.flags, result.case.sizes.get("L", 1)),
    ):
        if not set(result.case.flags) <= seen:
            chosen.append(result)
            seen |= set(result.case.flags)
    return [chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, n).astype(int))] if chosen else []


def _of_every_chunk(mutant, chunks):
    """The mutant at each chunk size; one without chunks counts for CHUNKS only, so that it is tried once."""
    if mutant.any_chunk:
        return [mutant._replace(chunk=C) for C in chunks]
    return [mutant] if chunks is CHUNKS else []


@functools.lru_cache(None)
def _answers(mutant, case, layout, dtype, gradients):
    """A mutant's answers to a case as a callee of this layout would give them, in the kit's own layout."""
    if mutant.any_chunk:
        longer = [C for C in CHUNKS if C > case.sizes.get("L", 1)]  # with any of these the case is one chunk
        mutant = mutant._replace(chunk=min(mutant.chunk, *longer)) if longer else mutant
    x, _ = put(Layout(), case)
    if case.op == "gated_delta_rule":
        x, norms = rule_inputs(layout, x)
        y = answers(mutant, case, in_dtype(x, held_in(dtype)), gradients)
        return take(Layout(), case, through_norms(y, norms if gradients else {}))
    return answers(mutant, case, in_dtype(x, held_in(dtype)), gradients)
