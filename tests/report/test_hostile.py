"""What models say and what records name is hostile: nothing of it becomes markup or hides."""

from __future__ import annotations

import json
import unicodedata

import pytest
from report_records import Tree, matrix, record

from expunge.records import Sample
from expunge.report.render import svg
from expunge.report.shown import visible

TAGS = [
    "<script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</svg><script>alert(1)</script>",
    "--><img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "' onmouseover='alert(1)",
    '" style="position:fixed',
    "javascript:alert(1)",
    "<a href='javascript:alert(1)'>x</a>",
    "{{ 7 * 7 }}{% raw %}",
    "<![CDATA[<script>]]>",
    "&lt;script&gt;&#60;script&#62;",
    "]]></desc><foreignObject>",
]
HIDDEN = [
    "abc\u202edef\u202c",  # right-to-left override
    "\u2066isolate\u2069",
    "zero\u200bwidth\u200d\ufeff",
    "soft\u00adhyphen",
    "null\x00bell\x07escape\x1b[31m\x7f\x85",
    "\ud800 half a pair",
    "\U000e0041 tag",
    "line\u2028paragraph\u2029",
    "\ue000 private \uffff",
    "Z" + "\u0301\u0302\u0303\u0304" * 40,
]
FINE = ["עברית و العربية", "e\u0301 café 漢字 🙂", "tab\tand\nline"]
EVERY = [*TAGS, *HIDDEN, *FINE]


def poisoned(bad, seed=0):
    """A record with ``bad`` in every place that a page shows."""
    base = record()
    recipe = {**base.provenance["recipe"], "forget": [bad], "note": bad, bad: "x", "o": {bad: bad}}
    recipe |= {"function": f"knowledge {bad}", "seed": seed}
    training = json.loads(json.dumps(base.training))
    training["curve"]["knobs"] = {bad: [1.0, 2.0, 3.0, 2.0, 1.0]}
    training["curve"]["logs"] = {bad: [1.0, 2.0, 3.0, 2.0, 1.0]}
    return record(
        f"objective {bad}",
        f"knowledge {bad}",
        seed,
        provenance={
            "recipe": recipe,
            "data": {bad: bad},
            "scorers": {bad: bad},
            "notes": [bad],
            "commit": bad,
            "packages": {bad: bad},
            "hardware": {"gpu": bad},
            "base": {bad: {"fingerprint": bad}},
        },
        asked={"forget": [bad] * 20, "retain": [bad] * 20},
        samples=[Sample(bad, bad, {"base": bad, "patched": bad}, {"base": [bad], "patched": []})],
        training=training,
    )


@pytest.fixture
def unchecked(monkeypatch):
    """Records are written as JSON escapes: a lone surrogate has no UTF-8."""

    def write(path, value):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    monkeypatch.setattr("expunge.records.write_json", write)


@pytest.fixture(scope="module")
def harmless_tags():
    return {
        "", "html", "head", "meta", "title", "style", "body", "a", "header", "h1", "h2", "h3",
        "main", "section", "span", "p", "dl", "dt", "dd", "div", "small", "nav", "ul", "li",
        "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "figure",
        "figcaption", "svg", "path", "text", "g", "desc", "code", "bdi", "b", "footer",
    }  # fmt: skip


@pytest.mark.parametrize("bad", EVERY, ids=ascii)
@pytest.mark.parametrize("n", [1, 3])
def test_hostile_text_stays_text(made, unchecked, harmless_tags, bad, n):
    found = made([poisoned(bad, seed) for seed in range(n)])
    stack = [found.root]
    while stack:
        node = stack.pop()
        stack += node.children
        assert node.tag in harmless_tags
        assert not any(name.startswith("on") or name == "style" for name in node.attributes)
        assert not any(
            (value or "").strip().lower().startswith("javascript:")
            for name, value in node.attributes.items()
            if name in ("href", "src", "xlink:href")
        )
    found.text.encode("utf-8")
    shown = {c for c in found.text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl")}
    assert shown <= {"\n", "\t"}
    for plot in found.page.plots:
        Tree(svg(plot))
        assert "<script" not in svg(plot)


@pytest.mark.parametrize("bad", [t for t in TAGS if "\n" not in t], ids=ascii)
def test_it_is_shown_as_it_was(made, unchecked, bad):
    """A control: nothing was merely dropped."""
    found = made([poisoned(bad)])
    assert bad in found.section("samples").words
    assert bad in found.section("flips").words
    assert bad in found.section("settings").words or "/" in bad
    assert bad in found.section("origin").words


def test_hidden_characters_are_written_out():
    assert visible("a\u202eb") == "a⟨U+202E⟩b"
    assert visible("a\x00\x1b") == "a⟨U+0000⟩⟨U+001B⟩"
    assert visible("\ud800") == "⟨U+D800⟩"
    assert visible("two\n\tlines") == "two\n\tlines"
    assert visible("עברית café 漢字 🙂") == "עברית café 漢字 🙂"
    assert visible("Z" + "\u0301" * 5) == "Z" + "\u0301" * 3 + "⟨U+0301⟩" * 2
    assert visible("x" * 20, longest=5) == "xxxxx … (15 more characters)"


def test_foreign_words_keep_to_themselves(made):
    """Names are isolated, and texts take their own direction."""
    found = made([poisoned("עברית")])
    for node in found.section("samples").all("h3", "dd"):
        assert node.all("span")[-1].attributes == {"class": "text", "dir": "auto"}
    assert any("עברית" in node.words for node in found.root.all("bdi"))
    assert ".text{display:block;unicode-bidi:isolate" in found.text


def test_where_things_lay_is_not_told(made):
    """Of whole paths the last part alone: pages are given away."""
    paths = ["/srv/me/secret/forget.txt", "~/secret/retain.txt", "C:\\secret\\x.txt"]
    recipe = {**record().provenance["recipe"], "forget": paths, "model": "/mnt/secret/model"}
    recipe["scorers"] = ["words:/srv/secret/words.txt", "tfidf"]
    data = {"/srv/me/secret/forget.txt": "ab"}
    notes = ["/srv/x/secret/a.txt: 3 of 9 rows skipped: 0.1 nats/token, see b/c"]
    found = made([record(provenance={"recipe": recipe, "data": data, "notes": notes})])
    assert "a.txt: 3 of 9 rows skipped: 0.1 nats/token, see b/c" in found.section("origin").words
    assert "secret" not in found.text and "/srv" not in found.text
    words = found.section("settings").words
    assert "forget.txt, retain.txt, x.txt" in words and "words:words.txt" in words


def test_a_long_text_is_cut(made):
    long = Sample("openings", "p" * 10_000, {"base": "b" * 100_000, "patched": "x"}, {})
    found = made([record(samples=[long])])
    assert len(found.text) < 200_000
    assert "98500 more characters" in found.section("samples").words


def test_runs_of_many_kinds_are_on_one_page(made):
    assert made([*matrix(), poisoned("<b>", 7)]).has("matrix")
