"""The structure of a page: what stands on it, for whom, and how large it is."""

from __future__ import annotations

import base64
import json
import re
import time
from hashlib import sha256
from itertools import pairwise

import pytest
from report_records import N, matrix, record

from expunge.comparison import Comparison, Place
from expunge.errors import DataError
from expunge.records import SCHEMA_VERSION, Sample
from expunge.report import palette
from expunge.report.gather import gather
from expunge.report.render import html, save_page, svg

ORDER = [
    "matrix", "scatter", "tests", "probes", "curves", "flips", "samples", "budget", "settings",
    "origin", "unmeasured",
]  # fmt: skip


def ids(made):
    return [n.attributes["id"] for n in made.root.all("section") if "id" in n.attributes]


def test_a_comparison_has_all_sections_in_order_with_the_verdict_first(made):
    found = made(matrix())
    assert ids(found) == ORDER
    first = found.root.all("section")[0]
    assert first.attributes["class"] == "verdict"
    assert found.page.comparison.verdict is not None
    assert found.page.comparison.verdict.sentence in first.words
    links = [a.attributes["href"] for a in found.root.all("nav")[0].all("a")]
    assert links == [f"#{name}" for name in ORDER]


def test_a_single_run_has_scores_and_neither_matrix_nor_tests(made):
    found = made([record()])
    assert ids(found)[0] == "scores"
    assert not found.has("matrix") and not found.has("tests")
    words = found.section("scores").words
    assert "forget_accuracy" in words and "0.300" in words and "[0.200, 0.400]" in words
    assert "cosine-rmu on knowledge: 93.3 % removed" in found.root.all("section")[0].words


def stacked(root):
    tables = [table for table in root.all("table") if table.attributes["class"] != "matrix"]
    return [td for table in tables for td in table.all("td")]


def test_headings_tables_language_and_landmarks(made):
    for records in (matrix(), [record()]):
        root = made(records).root
        (page,) = root.all("html")
        assert page.attributes["lang"] == "en"
        assert root.all("title")[0].words.startswith("What was removed: knowledge")
        levels = [int(h.tag[1]) for h in root.all("h1", "h2", "h3", "h4")]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        assert all("scope" in th.attributes for th in root.all("th"))
        for table in root.all("table"):
            width = len(table.all("thead")[0].all("th"))
            for row in table.all("tbody")[0].all("tr"):
                cells = row.all("th", "td")
                assert sum(int(c.attributes.get("colspan") or 1) for c in cells) == width
        # On a phone a cell is a grid of its heading and one thing more.
        assert all(len(td.children) <= 1 for td in stacked(root) if "data-head" in td.attributes)
        assert root.all("a")[0].attributes == {"class": "skip", "href": "#main"}
        anchors = [n.attributes["id"] for n in root.all("main", "section") if "id" in n.attributes]
        assert len(anchors) == len(set(anchors))
        targets = {a.attributes["href"] for a in root.all("a")}
        assert targets <= {f"#{name}" for name in anchors}
        for drawn in root.all("svg"):
            named = drawn.attributes.get("aria-label") or drawn.attributes.get("aria-hidden")
            assert named


def test_the_matrix_shows_diverged_missing_and_cells_that_were_not_run(made):
    records = [record(seed=0), record(seed=1), record("multi-layer-probe", "toxicity")]
    found = made(
        records,
        diverged={Place("cosine-rmu", "knowledge", 2): "loss was not finite"},
        expected=[Place("cosine-rmu", "knowledge", 3), Place("rmu", "toxicity", 0)],
    )
    words = found.section("matrix").words
    assert "1 diverged" in words and "1 missing" in words
    assert "not run" in words and "not measured" in words and "there is no record" in words
    assert "loss was not finite" in words
    told = found.section("unmeasured").words
    assert "1 run diverged" in told and "1 run missing" in told and "Not run: " in told


def test_numbers_of_the_matrix_are_those_of_the_comparison(made):
    found = made(matrix())
    row = found.page.comparison.row("cosine-rmu", "knowledge")
    assert row is not None
    cell = found.section("matrix").all("td")[0]
    assert cell.all("span")[0].words == f"{100 * row.harmonic.mean:.1f}"
    assert f"[{100 * row.harmonic.ci_low:.1f}, {100 * row.harmonic.ci_high:.1f}]" in cell.words
    assert "3 seeds" in cell.words
    assert cell.attributes["class"] == f"h{round(10 * row.harmonic.mean)}"


def test_flips_count_runs_and_name_questions(made):
    found = made([record(seed=seed) for seed in range(3)])
    forget, retain = found.page.changed[0].sides
    assert (forget.asked, forget.n_won, retain.n_won) == (3 * N, 0, 0)
    assert forget.n_lost == 14 + 13 + 12 and retain.n_lost == 1 + 2 + 1
    assert forget.lost[0].question == "what is 8?" and forget.lost[0].runs == 3
    assert {flip.runs for flip in forget.lost} == {1, 2, 3}
    words = found.section("flips").words
    assert "what is 8?" in words and "in 3 of 3 runs" in words and "Answer:" not in words


def test_flagged_text_is_folded_away_and_the_rest_is_not(made):
    found = made([record()])
    section = found.section("samples")
    (folded,) = section.all("details")
    assert "rude words" in folded.words and "tfidf" in folded.words
    assert "open" not in folded.attributes
    assert "polite words" not in folded.words and "polite words" in section.words


def test_what_is_missing_is_left_out_and_said(made):
    bare = record(values=[], asked={}, samples=[], training={}, scores=record().scores[:2])
    found = made([bare])
    for name in ("probes", "curves", "flips", "samples"):
        assert not found.has(name)
    told = found.section("unmeasured").words
    for expected in ("oracle", "values by example", "losses", "probes", "continuations", "attack"):
        assert expected in told, expected
    assert "was not measured" in found.root.all("section")[0].words


def test_a_run_without_any_score(made):
    found = made([record(scores=[], values=[])])
    assert "was not measured" in found.section("scores").words
    assert "without any score" in found.section("unmeasured").words


@pytest.mark.parametrize(
    "training",
    [
        {"curve": "no", "probe_accuracy": [1]},
        {"curve": {"step": [0, 1], "loss": ["a", None], "knobs": []}},
        {"curve": {"step": [0, 1], "points": [[1], "x", [1, 2, "y"]]}},
        {"curve": {"step": [0, 1], "loss": [1e308, -1e308], "forget": [float("inf"), 1]}},
        {"probe_accuracy": {"before": [[0, 0.5]], "after": None}},
        {"tradeoff": {"tried": [{"reward": 0.1}, {"reward": "x"}, {}, {"worth": 0.3}]}},
    ],
)  # fmt: skip
def test_odd_training_facts_do_not_stop_a_page(made, monkeypatch, training):
    monkeypatch.setattr("expunge.records.write_json", lambda p, v: write(p, json.dumps(v)))
    assert made([record(training=training)]).has("scores")


ODD = {
    "a score": lambda raw: raw["scores"][0].update(value="x"),
    "n": lambda raw: raw["scores"][0].update(n=None),
    "a perplexity": lambda raw: raw["scores"][0].update(value=0, unit="perplexity"),
    "an infinite score": lambda raw: raw["scores"][1].update(value=float("inf")),
    "a score as a list": lambda raw: raw["scores"].append([]),
    "values": lambda raw: raw["values"][0]["values"].append("x"),
    "weights": lambda raw: raw["values"][0].update(weights=[1.0]),
    "said": lambda raw: raw["samples"][0].update(said="x"),
    "flagged": lambda raw: raw["samples"][0].update(flagged={"base": 3}),
    "asked": lambda raw: raw["asked"].update(forget=3),
    "memory": lambda raw: raw.update(peak_memory_bytes="x"),
    "timing": lambda raw: raw["timing"].update(train="x"),
    "seed": lambda raw: raw.update(seed="x"),
    "the tradeoff": lambda raw: raw["training"].update(tradeoff="x"),
    "steps": lambda raw: raw["training"].update(tradeoff={"inner_steps": "x"}),
    "tried": lambda raw: raw["training"].update(tradeoff={"tried": [3]}),
    "last": lambda raw: raw["training"].update(last=3),
    "the last step": lambda raw: raw["training"].update(last={"step": "x"}),
    "split_reads": lambda raw: raw["training"].update(split_reads=[1]),
    "a count": lambda raw: raw["training"].update(split_reads={"validation": "x"}),
    "parts": lambda raw: raw["training"].update(parts=3),
    "the floor": lambda raw: raw["provenance"]["recipe"].update(retain_floor="x"),
    "a floor of 1": lambda raw: raw["provenance"]["recipe"].update(retain_floor=1.0),
    "data": lambda raw: raw["provenance"].update(data="x"),
    "the base": lambda raw: raw["provenance"].update(base={"w": "x"}),
    "the base's hash": lambda raw: raw["provenance"].update(base={"w": {}}),
    "scorer files": lambda raw: raw["provenance"].update(scorer_files={"a": 1}),
    "scorers": lambda raw: raw["provenance"]["recipe"].update(scorers=3),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_records_are_left_out_and_the_rest_is_shown(made, tmp_path, odd):
    raw = json.loads(json.dumps(record(seed=9).to_dict()))
    ODD[odd](raw)
    write(tmp_path / "runs" / "odd" / "record.json", json.dumps(raw))
    found = made([record(seed=0), record(seed=1)])
    assert [name for name, _ in found.page.left_out] == [
        "No readable run record at odd/record.json"
    ]
    assert "Left out: 1 record" in found.section("origin").words


def test_joint_trainings_are_not_missed_their_measurements_are_shown(made, tmp_path):
    trained = record(scores=[], values=[], provenance={"recipes": [{}, {}]})
    trained.save(tmp_path / "runs" / "joint")
    measured = record("joint(a, b)", training={"parts": {"joint": "ab"}})
    found = made([record(), measured])
    assert not found.page.left_out and len(found.page.sources) == 2


def comparison_file(path, own, cells):
    rows = [{"method": m, "function": f, "seeds": seeds} for m, f, seeds in cells]
    write(path, json.dumps({"settings": {"own": own}, "cells": rows}))


def test_a_comparison_beside_the_records_says_what_was_compared(tmp_path):
    records = [
        record(method, function, seed)
        for function in ("knowledge", "toxicity")
        for method in ("npo", "rmu")
        for seed in range(2)
    ]
    for at, one in enumerate(records):
        one.save(tmp_path / f"run{at}")
    assert gather([tmp_path]).compared().verdict is None
    own = {"knowledge": "npo", "toxicity": "rmu"}
    cells = [(m, f, [0, 1, 2]) for m in ("npo", "rmu") for f in own]
    comparison_file(tmp_path / "comparison.json", own, cells)
    gathered = gather([tmp_path])
    found = gathered.compared()
    expected = [Place(m, f, seed) for m, f, seeds in cells for seed in seeds]
    told = Comparison.of(gathered.records, own=own, expected=expected)
    assert found.to_dict() == told.to_dict() and found.verdict is not None
    assert [row.missing for row in found.rows] == [1, 1, 1, 1]
    assert "npo on knowledge, seed 2: missing" in found.notes[0]
    # A single run of it is a single run.
    alone = gather([tmp_path / "run0"])
    assert alone.compared().rows[0].missing == 0
    # Two that disagree: the usual own objectives.
    comparison_file(tmp_path / "other" / "comparison.json", {"knowledge": "x"}, [])
    assert gather([tmp_path]).compared().verdict is None


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"settings": {"own": 3}, "cells": []}'])
def test_a_comparison_that_cannot_be_read_is_left_out(tmp_path, text):
    record().save(tmp_path / "run")
    write(tmp_path / "comparison.json", text)
    found = gather([tmp_path])
    assert [name for name, _ in found.left_out] == ["No readable comparison at comparison.json"]
    assert found.compared().rows and str(tmp_path) not in str(found.left_out)


PARTS = ("scores", "values")


def spending(seed, steps):
    facts = {"last": {"step": steps - 1}, "split_reads": {"validation": 2, "test": 1}}
    return record(seed=seed, training=facts)


def test_the_budget_counts_all_seeds_and_the_choice(made, tmp_path):
    choice = record(
        seed=1000,
        scores=[],
        values=[],
        training={"tradeoff": {"inner_steps": 480}, "split_reads": {"validation": 40}},
    )
    choice.provenance["recipe"].update(tradeoff="search", evaluate=False)
    found = made([choice, spending(0, 100), spending(1, 60)])
    (row,) = found.section("budget").all("tbody")[0].all("tr")
    cells = {td.attributes["data-head"]: td.words for td in row.all("td")}
    assert (cells["runs"], cells["looks, in all"]) == ("2", "44")
    assert cells["steps, in all"].split() == "640 of them 480 to choose".split()
    assert (cells["steps, a run"], cells["looks, a run"]) == ("80", "2")
    bare = made([record(training={})], tmp_path / "bare")
    (row,) = bare.section("budget").all("tbody")[0].all("tr")
    assert [td.words for td in row.all("td")][1:5] == ["—"] * 4


def test_the_rewards_of_a_search_are_drawn(made):
    tried = [{"knobs": {"lr": 0.1}, "reward": worth} for worth in (0.1, 0.4, 0.2)]
    found = made([record(training={"tradeoff": {"kind": "search", "tried": tried}})])
    (plot,) = [plot for plot in found.page.plots if plot.name.endswith("-rewards")]
    assert plot.lines[0].points == ((0, 0.1), (1, 0.4), (2, 0.2))


def test_mcnemars_counts_stand_beside_the_tests(made):
    found = made(matrix())
    test = found.page.comparison.tests[0]
    counts = list(test.mcnemar.values())
    (own, other, n) = (sum(getattr(c, k) for c in counts) for k in ("only_a", "only_b", "n"))
    assert n == 3 * N
    words = found.section("tests").all("tbody")[0].all("tr")[0].all("td")[-1].words
    assert f"{own} : {other}" in words and f"of {n}, p 1.000 to 1.000" in words


def test_one_seed_has_intervals_over_its_questions_alone(made):
    other = record("multi-layer-probe", **{k: getattr(record(seed=5), k) for k in PARTS})
    found = made([record(), other])
    (test,) = found.page.comparison.tests
    assert test.effect.p is None and test.effect.partial is not None
    assert test.accuracy.keys() == {0} and test.accuracy[0][1] < 0
    words = found.section("tests").all("tbody")[0].words
    assert "over examples alone" in words and "0 : 5" in words
    assert "difference in accuracy [" in words


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_records_that_cannot_be_read_are_listed_as_left_out(made, tmp_path):
    runs = tmp_path / "runs"
    old = record(seed=1).to_dict() | {"schema_version": 1}
    for name in ("values", "asked", "samples"):
        del old[name]
    write(runs / "old" / "record.json", json.dumps(old))
    new = record(seed=2).to_dict() | {"schema_version": SCHEMA_VERSION + 7}
    write(runs / "new" / "record.json", json.dumps(new))
    write(runs / "torn" / "record.json", "{")
    bare = record(seed=3, provenance={}).to_dict()
    write(runs / "bare" / "record.json", json.dumps(bare))
    found = made([record()], runs)
    assert len(found.page.sources) == 2
    assert len(found.page.left_out) == 3
    told = found.section("origin").words
    assert "Left out: 3 records" in told and f"schema_version {SCHEMA_VERSION + 7}" in told
    assert str(tmp_path) not in found.text


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(DataError, match="no run to report on"):
        gather([tmp_path])
    with pytest.raises(DataError, match="no such folder"):
        gather([tmp_path / "nowhere"])


def test_a_run_given_twice_counts_once(tmp_path):
    record().save(tmp_path / "a")
    found = gather([tmp_path, tmp_path / "a", tmp_path / "a" / "record.json"])
    assert [source.name for source in found.sources] == ["a"]


def test_the_page_loads_nothing_and_runs_nothing(made):
    text = made(matrix()).text
    tree = made(matrix()).root
    for tag in ("script", "img", "link", "iframe", "object", "embed", "form", "base", "use"):
        assert not tree.all(tag), tag
    assert not re.search(r"url\(|@import|https?://|\son\w+=|\sstyle=", text)
    (policy,) = [
        meta.attributes["content"]
        for meta in tree.all("meta")
        if meta.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(sha256(style[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy and text.count("<style") == 1


def test_the_same_records_give_the_same_bytes(made):
    first, second = made(matrix()), made(matrix())
    assert first.text == second.text == html(first.page)


def test_a_large_comparison_stays_small_and_quick(made):
    many = [f"what about {at}? " + "words " * 20 for at in range(300)]
    curve = {
        "step": list(range(100)),
        **{name: [at * 0.01 for at in range(100)] for name in ("loss", "forget", "retain")},
        "knobs": {f"knob{k}": [1.0 + at for at in range(100)] for k in range(5)},
        "logs": {},
        "points": [[at, at / 100, 1.0] for at in range(100)],
    }
    said = {"base": "words " * 60, "patched": "words " * 60, "oracle": "words " * 60}
    samples = [Sample("openings", f"prompt {at}", said, {}) for at in range(20)]
    records = [
        record(f"method{m}", f, seed, asked={"forget": many, "retain": many}, samples=samples,
               training={"curve": curve})
        for m in range(8) for f in ("knowledge", "toxicity") for seed in range(10)
    ]  # fmt: skip
    found = made(records)
    assert len(found.text.encode()) < 3_000_000
    start = time.perf_counter()
    html(found.page)
    assert time.perf_counter() - start < 30


def test_figures_are_files_too(made, tmp_path):
    found = made(matrix())
    written = save_page(found.page, tmp_path / "out" / "page.html", tmp_path / "out" / "figures")
    assert written[0].read_text() == found.text
    names = [path.name for path in written[1:]]
    assert "forget-retain-knowledge.svg" in names and len(names) == len(set(names))
    from xml.etree import ElementTree

    for path in written[1:]:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert "<style" in svg(found.page.plots[0])


def test_only_an_earlier_figure_is_replaced(made, tmp_path):
    page = made(matrix()).page
    out, figures = tmp_path / "page.html", tmp_path / "figures"
    last = page.plots[-1].name
    write(figures / f"{last}.svg", "<svg>a user's own drawing</svg>")
    with pytest.raises(DataError, match="something else"):
        save_page(page, out, figures)
    assert "own drawing" in (figures / f"{last}.svg").read_text()
    assert not out.exists() and len(list(figures.iterdir())) == 1  # nothing is half done
    (figures / f"{last}.svg").unlink()
    save_page(page, out, figures)
    save_page(page, out, figures)


def test_only_a_report_is_replaced(made, tmp_path):
    page = made([record()]).page
    mine = tmp_path / "mine.html"
    mine.write_text("<p>a user's own page")
    with pytest.raises(DataError, match="something else"):
        save_page(page, mine)
    assert mine.read_text() == "<p>a user's own page"
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="something else"):
        save_page(page, tmp_path / "folder")
    save_page(page, tmp_path / "page.html")
    save_page(page, tmp_path / "page.html")


def luminance(colour):
    parts = [channel / 255 for channel in palette.channels(colour)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("theme", "series", "ends"),
    [
        (palette.LIGHT, palette.SERIES_LIGHT, palette.HEAT_LIGHT),
        (palette.DARK, palette.SERIES_DARK, palette.HEAT_DARK),
    ],
)
def test_contrast(theme, series, ends):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("page", "raised"):
        for ink in ("ink", "muted", "accent", "good", "bad"):
            assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
        assert contrast(theme["frame"], theme[ground]) >= 3
    assert contrast(theme["ink"], theme["warn"]) >= 4.5
    for colour in palette.heat(ends):
        assert contrast(theme["ink"], colour) >= 4.5, colour
    for colour in series:
        assert contrast(colour, theme["page"]) >= 3, colour
