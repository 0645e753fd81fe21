"""From records to rows, and all that a reader must be told."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from handmade import knowledge, toxicity

from expunge.comparison import Comparison, Place
from expunge.errors import DataError

RMU, PROBE = "cosine-rmu", "multi-layer-probe"


def noted(compared: Comparison, *words: str) -> bool:
    return any(all(word in note for word in words) for note in compared.notes)


def test_rows_by_hand() -> None:
    compared = Comparison.of(
        [
            toxicity(PROBE),
            knowledge(RMU, 1, forget=0.25, rise=0.0, retain=0.75),
            knowledge(RMU, 0, forget=0.5, rise=0.0, retain=0.75),
        ]
    )
    assert [(row.method, row.function) for row in compared.rows] == [
        (PROBE, "toxicity"),
        (RMU, "knowledge"),
    ]
    row = compared.row(RMU, "knowledge")
    assert row is not None and [cell.place.seed for cell in row.cells] == [0, 1]
    assert row.forget.mean == pytest.approx(0.75) and row.retain.mean == 1
    assert row.harmonic.mean == pytest.approx((2 / 3 + 1) / 2) and row.harmonic.n == 2
    assert row.harmonic.sd == pytest.approx(np.std([2 / 3, 1], ddof=1))
    assert row.hypervolume.mean == pytest.approx(0.75)
    assert row.parts["forget_accuracy"].mean == pytest.approx(0.75)
    assert compared.row("rmu", "knowledge") is None
    assert noted(compared, PROBE, "one seed only")


def test_missing_and_diverged_cells_are_shown_and_counted() -> None:
    places = [Place(RMU, "knowledge", seed) for seed in range(4)]
    compared = Comparison.of(
        [knowledge(RMU, 0), knowledge(RMU, 1)],
        expected=places,
        diverged={places[1]: "never", places[2]: "loss not finite"},
    )
    (row,) = compared.rows
    assert [cell.status for cell in row.cells] == ["measured", "measured", "diverged", "missing"]
    assert (row.missing, row.diverged, row.harmonic.n, row.parts["perplexity"].n) == (1, 1, 3, 2)
    measured = row.cells[0].harmonic
    assert measured is not None and row.harmonic.mean == pytest.approx(measured * 2 / 3)
    assert noted(compared, "seed 3", "missing", "no record")
    assert noted(compared, "seed 2", "diverged", "loss not finite")
    assert noted(compared, "seed 1", "said to have diverged")


def test_all_missing_is_no_0() -> None:
    compared = Comparison.of([], expected=[Place(RMU, "knowledge", 0)])
    assert compared.rows[0].harmonic.mean is None and compared.verdict is None
    json.dumps(compared.to_dict(), allow_nan=False)


def test_sums_and_side_effects_are_interference() -> None:
    both = "cosine-rmu + multi-layer-probe"
    compared = Comparison.of(
        [
            knowledge(RMU),
            toxicity(PROBE),
            knowledge(both, removed="knowledge + toxicity"),
            toxicity(both, removed="knowledge + toxicity"),
            knowledge(PROBE, removed="toxicity"),
        ]
    )
    assert [(r.method, r.function, r.removed) for r in compared.interference] == [
        (both, "knowledge", "knowledge + toxicity"),
        (PROBE, "knowledge", "toxicity"),
        (both, "toxicity", "knowledge + toxicity"),
    ]
    # A patch against toxicity is no attempt to remove knowledge.
    assert compared.row(PROBE, "knowledge") is None and not compared.tests
    assert noted(compared, both, "patches for knowledge + toxicity")


def test_what_is_removed_together_is_tested_against_the_part_alone() -> None:
    both = {"objective": f"joint({RMU}, {PROBE})", "removed": "knowledge + toxicity"}
    forget = {"alone": (0.3, 0.35, 0.3), "both": (0.4, 0.45, 0.45)}
    records = [
        *(knowledge(RMU, seed, forget=x) for seed, x in enumerate(forget["alone"])),
        *(knowledge(seed=seed, forget=x, **both) for seed, x in enumerate(forget["both"])),
        knowledge(PROBE, removed="toxicity"),
        toxicity(RMU),
    ]
    compared = Comparison.of(records)
    (test,) = compared.interference_tests
    assert (test.function, test.own, test.other) == ("knowledge", both["objective"], RMU)
    # Forgetting fell by .1 / .1 / .15 of the .5 that the base knew above chance.
    assert test.parts["forget"].mean == pytest.approx(-(0.1 + 0.1 + 0.15) / 3 / 0.5)
    assert test.effect.mean is not None and test.effect.mean < 0 and test.effect.n_seeds == 3
    assert test.p_adjusted == pytest.approx(test.effect.p)
    assert all(test.own != both["objective"] for test in compared.tests)


def test_mixed_recipes_are_noted() -> None:
    compared = Comparison.of([knowledge(RMU, 0, lr=0.1), knowledge(RMU, 1, lr=0.2, steps=80)])
    assert noted(compared, "the recipes of its seeds differ in lr, steps")
    assert not noted(Comparison.of([knowledge(RMU, 0), knowledge(RMU, 1)]), "differ")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"data": {"questions.jsonl": "another"}}, "data"),
        ({"temperature": 0.5}, "temperature"),
        ({"model": "elsewhere/other"}, "model"),
        ({"scorers": ["words:x/other.txt"]}, "scorers"),
    ],
)
def test_what_was_not_measured_alike_is_not_tested(change: dict[str, object], word: str) -> None:
    records = [knowledge(RMU, seed) for seed in (0, 1)]
    records += [knowledge("npo", seed, forget=0.4, **change) for seed in (0, 1)]  # type: ignore[arg-type]
    compared = Comparison.of(records)
    (test,) = compared.tests
    assert test.effect.mean is None and test.p_adjusted is None and not test.mcnemar
    assert test.effect.reason == f"refused: they were not measured alike ({word})"
    assert noted(compared, "unlike grounds", word, "refused")


def test_the_place_of_files_does_not_matter() -> None:
    records = [knowledge(RMU, 0, data={"a/q.jsonl": "1"}, model="x/base")]
    records += [knowledge("npo", 0, data={"b/q.jsonl": "1"}, model="y/base")]
    compared = Comparison.of(records)
    assert compared.tests[0].effect.mean == 0 and not noted(compared, "unlike")


def test_other_numbers_of_examples_are_refused() -> None:
    compared = Comparison.of(
        [knowledge(RMU, s, n=40) for s in (0, 1)] + [knowledge("npo", s, n=80) for s in (0, 1)]
    )
    assert "forget_accuracy has 40 examples in one run, 80" in str(compared.tests[0].effect.reason)


def test_other_base_weights_under_one_name_are_refused() -> None:
    def on(record, fingerprint):  # type: ignore[no-untyped-def]
        base = {"down_proj.weight": {"fingerprint": fingerprint}}
        return replace(record, provenance={**record.provenance, "base": base})

    ours, theirs = knowledge(RMU, forget=0.4), knowledge("npo")
    same = Comparison.of([on(ours, "1"), on(theirs, "1"), knowledge("banned-words")])
    assert all(test.effect.mean is not None for test in same.tests)
    other = Comparison.of([on(ours, "1"), on(theirs, "2")])
    assert other.tests[0].effect.reason == "refused: they changed other base models"


def test_records_without_values_are_compared_over_seeds_alone() -> None:
    records = [knowledge(RMU, s, forget=0.3 + s / 10, values=False) for s in range(3)]
    records += [knowledge("npo", s, forget=0.6 + s / 40, values=False) for s in range(3)]
    compared = Comparison.of(records)
    effect = compared.tests[0].effect
    assert effect.p is None and effect.partial is not None and effect.partial.over == "seeds"
    assert noted(compared, "without values example by example")


def test_unequal_budgets_are_noted() -> None:
    learned = {"tradeoff": {"inner_steps": 560}, "looks": 70}
    plain = {"last": {"step": 79}, "looks": 4}
    compared = Comparison.of([knowledge(RMU, training=plain), knowledge("npo", training=learned)])
    assert noted(compared, "knowledge: unequal budgets, steps", "cosine-rmu 80, npo 560")
    assert noted(compared, "looks at validation with all seeds: cosine-rmu 4, npo 70")
    equal = Comparison.of([knowledge(RMU, training=plain), knowledge("npo", training=plain)])
    assert not noted(equal, "unequal budgets")


def test_how_runs_went_is_noted() -> None:
    facts: dict[str, object] = {"collapsed": 40, "split_reads": {"test": 2}}
    compared = Comparison.of([knowledge(RMU, 1, training=facts, measure_on="validation")])
    assert noted(compared, "collapsed with seed 1")
    for ended, word in (("collapsed", "collapsed"), ("diverged", "diverged after a look")):
        tried = [{"ended": "whole"}, {"ended": ended}]
        facts["tradeoff"] = {"tried": tried, "chosen": {"episode": 1}}
        facts["collapsed"] = None
        searched = Comparison.of([knowledge(RMU, 1, training=facts)])
        assert noted(searched, f"{word} ", "with seed 1; the best state before counts")
        tried[0], tried[1] = tried[1], tried[0]
        assert not noted(
            Comparison.of([knowledge(RMU, 1, training=facts)]), "with seed 1; the best"
        )
    assert noted(compared, "read more than once with seed 1")
    assert noted(compared, "measured on validation")


def test_learned_trade_offs_are_the_own_objectives_where_there_are_no_others() -> None:
    records = [knowledge(RMU, tradeoff="learned"), toxicity(PROBE, tradeoff="learned")]
    own = Comparison.of(records).settings.own
    assert own == {"knowledge": f"{RMU} (learned)", "toxicity": f"{PROBE} (learned)"}
    assert Comparison.of([*records, knowledge(RMU)]).settings.own["knowledge"] == RMU


def test_oracles_one_of_each_function() -> None:
    def taught_nothing(record):  # type: ignore[no-untyped-def]
        base = [replace(s, model="oracle") for s in record.scores if s.model == "base"]
        return replace(record, scores=[*record.scores, *base])

    records = [knowledge(RMU, 0), *(taught_nothing(knowledge(RMU, s)) for s in (1, 2))]
    compared = Comparison.of([*records, taught_nothing(toxicity(PROBE))])
    assert [(o.place.function, o.place.seed) for o in compared.oracles] == [
        ("knowledge", 1),
        ("toxicity", 0),
    ]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"records": []}, "nothing to compare"),
        ({"records": [knowledge(RMU), knowledge(RMU)]}, "Two records fill one cell"),
        ({"records": [knowledge(RMU)], "margin": 0.0}, "margin"),
        ({"records": [replace(knowledge(RMU), provenance={"recipe": None})]}, "recipe"),
    ],
)
def test_bad_input_is_told_in_four_parts(arguments: dict, what: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(DataError, match=what) as told:
        Comparison.of(**arguments)
    assert told.value.got and told.value.allowed and told.value.fix


def test_json_form() -> None:
    found = Comparison.of(
        [knowledge(RMU), toxicity(PROBE), knowledge(PROBE), toxicity(RMU)]
    ).to_dict()
    assert {"cells", "tests", "verdict", "interference", "notes"} <= found.keys()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["cells"][0]["by_seed"][0]["parts"]["forget_accuracy"] == pytest.approx(0.5)
    assert found["verdict"]["word"] == "undecided"
    assert found["settings"].keys() == {"own", "margin"}
