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

from expunge.comparison import Place
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
        {"tradeoff": {"rewards": [0.1, "x", None, 0.3]}},
    ],
)  # fmt: skip
def test_odd_training_facts_do_not_stop_a_page(made, monkeypatch, training):
    monkeypatch.setattr("expunge.records.write_json", lambda p, v: write(p, json.dumps(v)))
    assert made([record(training=training)]).has("scores")


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
