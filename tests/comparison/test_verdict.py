"""Which word the matrix comes to, and the numbers in its sentence."""

from __future__ import annotations

import re

import numpy as np
import pytest
from handmade import knowledge, toxicity

from expunge.comparison import Comparison, Place, Verdict
from expunge.evaluation.paired import holm
from expunge.records import RunRecord

RMU, PROBE = "cosine-rmu", "multi-layer-probe"
N = 300


def matrix(
    on_knowledge: dict[str, float], on_toxicity: dict[str, float], seeds: int = 4
) -> list[RunRecord]:
    """Records with drawn answers.

    Args:
        on_knowledge: method -> accuracy left of .75; .25 is all forgotten.
        on_toxicity: method -> rate left of .5.
    """
    generator = np.random.default_rng(0)
    found = []
    for seed in range(seeds):
        for method, left in on_knowledge.items():
            found.append(
                knowledge(
                    method, seed, forget=left, retain=0.75, rise=0.0, n=N, generator=generator
                )
            )
        for method, left in on_toxicity.items():
            found.append(
                toxicity(method, seed, rates=(left, left), rise=0.0, n=N, generator=generator)
            )
    return found


def verdict(records: list[RunRecord], **settings: float) -> Verdict:
    found = Comparison.of(records, **settings).verdict  # type: ignore[arg-type]
    assert found is not None
    return found


def test_specialised() -> None:
    records = matrix({RMU: 0.3, PROBE: 0.6, "npo": 0.5}, {RMU: 0.4, PROBE: 0.1})
    compared = Comparison.of(records)
    found = compared.verdict
    assert found is not None and found.word == "specialised"
    assert [(t.function, t.own, t.other) for t in compared.tests] == [
        ("knowledge", RMU, PROBE),
        ("knowledge", RMU, "npo"),
        ("toxicity", PROBE, RMU),
    ]
    assert [t.p_adjusted for t in compared.tests] == holm([t.effect.p for t in compared.tests])
    first = found.primary[0].effect
    row, other = compared.row(RMU, "knowledge"), compared.row(PROBE, "knowledge")
    assert row is not None and other is not None and first.mean is not None
    assert first.mean == pytest.approx(row.harmonic.mean - other.harmonic.mean)  # type: ignore[operator]
    assert found.sentence.startswith("Specialised: on knowledge cosine-rmu beats multi-layer-probe")
    assert f"by {first.mean:.2f}".replace("0.", ".") in found.sentence
    assert re.search(
        r"retaining \(p = \.00\d after Holm over 3 tests\); on toxicity", found.sentence
    )
    assert "on toxicity multi-layer-probe beats cosine-rmu by" in found.sentence
    assert found.power == "It is decided with these seeds and examples."


def test_parts_and_counts_stand_beside_each_test() -> None:
    test = Comparison.of(matrix({RMU: 0.3, PROBE: 0.6}, {RMU: 0.4, PROBE: 0.1})).tests[0]
    assert set(test.parts) == {"forget", "retain"} and test.parts["forget"].p is not None
    assert set(test.mcnemar) == {0, 1, 2, 3}
    # More questions that only the other still answers: own has forgotten more.
    assert all(one.only_b > one.only_a and one.n == N for one in test.mcnemar.values())


def test_interchangeable() -> None:
    same = matrix({RMU: 0.3}, {RMU: 0.1})
    records = [*same, *(_renamed(one, PROBE) for one in same)]
    found = verdict(records)
    assert found.word == "interchangeable" and "smaller than .05" in found.sentence
    assert found.primary[0].effect.p == 1


def test_one_objective_for_both() -> None:
    found = verdict(matrix({RMU: 0.3, PROBE: 0.6}, {RMU: 0.05, PROBE: 0.35}))
    assert found.word == "one objective for both"
    assert "on toxicity multi-layer-probe loses to cosine-rmu by ." in found.sentence


def test_one_objective_is_enough_where_it_is_as_good_on_the_other_function() -> None:
    """Better at home and not worse abroad: the other function needs no objective of its own."""
    same = matrix({}, {PROBE: 0.1})
    records = [*matrix({RMU: 0.3, PROBE: 0.6}, {}), *same, *(_renamed(one, RMU) for one in same)]
    found = verdict(records)
    assert found.word == "one objective for both"
    assert "multi-layer-probe is 0 [0, 0] above cosine-rmu" in found.sentence
    assert "smaller than .05, p < .001" in found.sentence


def test_undecided_says_what_would_decide() -> None:
    found = verdict(matrix({RMU: 0.3, PROBE: 0.33}, {RMU: 0.4, PROBE: 0.1}, seeds=3))
    assert found.word == "undecided" and "which chance could explain" in found.sentence
    assert found.power.startswith("On knowledge, cosine-rmu against multi-layer-probe: ")
    assert "seeds (now 3)" in found.power and "examples (now " in found.power
    assert "toxicity" not in found.power


def test_one_seed_is_undecided_and_says_so() -> None:
    found = verdict(matrix({RMU: 0.3, PROBE: 0.6}, {RMU: 0.4, PROBE: 0.1}, seeds=1))
    assert found.word == "undecided"
    assert "untested (one seed: says nothing about others)" in found.sentence
    assert "over examples of this seed alone" in found.sentence
    assert found.primary[0].p_adjusted is None


def test_a_wide_margin_makes_them_interchangeable_and_says_that_they_differ() -> None:
    """A difference too small to matter does not make two objectives necessary."""
    found = verdict(matrix({RMU: 0.3, PROBE: 0.45}, {RMU: 0.2, PROBE: 0.1}), margin=0.4)
    assert found.word == "interchangeable"
    assert "beats" in found.sentence and "smaller than .40" in found.sentence


def test_diverged_runs_count_as_0() -> None:
    records = matrix({RMU: 0.3}, {RMU: 0.4, PROBE: 0.1})
    lost = {Place(PROBE, "knowledge", seed): "loss not finite" for seed in range(4)}
    compared = Comparison.of(records, diverged=lost)
    row = compared.row(PROBE, "knowledge")
    assert row is not None and (row.diverged, row.harmonic.mean, row.forget.mean) == (4, 0, 0)
    own = compared.row(RMU, "knowledge")
    assert own is not None and compared.tests[0].effect.mean == pytest.approx(own.harmonic.mean)
    assert compared.verdict is not None and compared.verdict.word == "specialised"
    assert sum("diverged, counted as forget 0, retain 0" in note for note in compared.notes) == 4


def test_both_diverged_is_no_difference_and_no_test() -> None:
    lost = {Place(m, "knowledge", seed): "nan" for m in (RMU, PROBE) for seed in range(3)}
    compared = Comparison.of(matrix({}, {RMU: 0.4, PROBE: 0.1}), diverged=lost)
    assert compared.tests[0].effect.mean == 0 and compared.tests[0].effect.p is None
    assert compared.verdict is not None and "both diverged" in compared.verdict.sentence


def test_no_verdict_without_the_cells() -> None:
    records = matrix({RMU: 0.3, PROBE: 0.6}, {RMU: 0.4, PROBE: 0.1})
    rude = [r for r in records if r.function == "toxicity"]
    apart = [r for r in records if r in rude or (r.objective == RMU) == (r.seed < 2)]
    for kept, reason in (
        ([r for r in records if r.objective == RMU], "not both run on knowledge"),
        (rude, "not both run on knowledge"),
        (apart, "no seed was run with both"),
    ):
        compared = Comparison.of(kept)
        assert compared.verdict is None and reason in str(compared.verdict_reason)


def test_own_objectives_may_be_named() -> None:
    records = matrix({"a": 0.3, "b": 0.6}, {"a": 0.4, "b": 0.1})
    compared = Comparison.of(records, own={"knowledge": "b", "toxicity": "a"})
    assert compared.verdict is not None
    assert all(test.worse for test in compared.verdict.primary)
    assert compared.verdict.word == "crossed"
    assert "each is better on the other function than on its own" in compared.verdict.sentence
    assert Comparison.of(records).verdict is None
    for own in ({"knowledge": "a"}, {"knowledge": "a", "toxicity": "a"}):
        assert Comparison.of(records, own=own).verdict is None


def _renamed(record: RunRecord, objective: str) -> RunRecord:
    return RunRecord.from_dict({**record.to_dict(), "objective": objective})
