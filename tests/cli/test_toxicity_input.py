"""Every mistake of a user of toxicity: four parts, an exit code of its own, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import (
    CONTEXT,
    POLITE,
    RUDE,
    World,
    save_tokenizer,
    sentences,
    wordings,
    write_lines,
    write_pairs,
    write_rows,
)
from test_bad_input import DATA, MODEL, RECIPE, check
from transformers import LlamaConfig, LlamaForSequenceClassification

Case = tuple[Callable[[World, Path], dict[str, Any]], tuple[str, ...], int, tuple[str, ...]]


def plain(**changes: Any) -> Callable[[World, Path], dict[str, Any]]:
    """Flags that need no file."""
    return lambda _world, _folder: changes


def one_class(label: int) -> Callable[[World, Path], dict[str, Any]]:
    def make(_world: World, folder: Path) -> dict[str, Any]:
        rows = [{"text": text, "label": label} for text in sentences(40, seed=30)]
        return {"pairs": None, "labelled": write_rows(folder / "labelled.jsonl", rows)}

    return make


def written(name: str, lines: list[str], flag: str = "pairs") -> Any:
    """A file of these lines, given by a flag."""
    return lambda _world, folder: {flag: write_lines(folder / name, lines)}


def alike(_world: World, folder: Path) -> dict[str, Any]:
    """Pairs whose sides differ by chance alone."""
    sides = sentences(240, seed=31)
    return {"pairs": write_pairs(folder / "pairs.tsv", list(zip(sides[::2], sides[1::2])))}  # noqa: B905


def classifier(labels: tuple[str, ...], spec: str = "hf:{}") -> Any:
    def make(world: World, folder: Path) -> dict[str, Any]:
        config = LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            vocab_size=64, num_labels=len(labels), pad_token_id=0,
            id2label=dict(enumerate(labels)), label2id={one: i for i, one in enumerate(labels)},
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder / "judge")
        save_tokenizer(folder / "judge")
        return {"scorer": ("tfidf", spec.format(folder / "judge"))}

    return make


CASES: dict[str, Case] = {
    # ---- which data
    "neither pairs nor labelled": (
        plain(pairs=None), (), RECIPE, ("neither", "exactly one of pairs, labelled"),
    ),
    "both": (
        lambda world, _folder: {"labelled": world.labelled},
        (), RECIPE, ("got:     both", "exactly one of pairs, labelled"),
    ),
    "forget": (
        lambda world, _folder: {"forget": world.forget},
        (), RECIPE, ("toxicity takes no forget", "--pairs", "--labelled"),
    ),
    "questions": (
        lambda world, _folder: {"questions": world.questions},
        (), RECIPE, ("toxicity takes no questions", "--retain-questions"),
    ),
    "refusals": (
        lambda world, _folder: {}, ("--set", "refusals=idk.txt"),
        RECIPE, ("toxicity takes no refusals", "idk.txt", "--pairs"),
    ),
    "no retain": (plain(retain=None), (), RECIPE, ("lacks retain", "--retain")),
    "pairs for knowledge": (
        lambda world, _folder: {"function": "knowledge", "forget": world.forget, "prompts": None},
        (), RECIPE, ("knowledge takes no pairs",),
    ),
    # ---- the files
    "no toxic text": (one_class(0), (), DATA, ("holds no toxic text", "0 toxic, 40 neutral")),
    "no neutral text": (one_class(1), (), DATA, ("holds no neutral text", "40 toxic, 0 neutral")),
    "all rows unpaired": (
        written("pairs.tsv", ["toxic\tneutral1", "w51 w52 w53\t", "\tw1 w2 w3"]),
        (), DATA, ("pairs.tsv", "no usable row"),
    ),
    "pairs of equal sides": (
        written("pairs.tsv", ["toxic\tneutral1", "w1 w2 w3\tw1 w2 w3"]),
        (), DATA, ("pairs.tsv", "no usable row"),
    ),
    "texts in the place of pairs": (
        written("pairs.txt", sentences(5, seed=32)), (), DATA, ("pairs.txt", "toxic"),
    ),
    "labels that are none": (
        lambda _world, folder: {
            "pairs": None,
            "labelled": write_rows(folder / "l.jsonl", [{"text": "w1 w2", "label": "rather"}]),
        },
        (), DATA, ("l.jsonl", "no usable row"),
    ),
    "missing pairs": (plain(pairs="/no/such/pairs.tsv"), (), DATA, ("No such file", "pairs.tsv")),
    "missing prompts": (plain(prompts="/no/such.jsonl"), (), DATA, ("No such file",)),
    "empty prompts": (written("p.txt", [""], "prompts"), (), DATA, ("p.txt is empty",)),
    "toxic texts among the retain texts": (
        lambda _world, folder: {
            "retain": write_lines(
                folder / "r.txt", [*sentences(9, seed=2), wordings(120, seed=7)[0][0]]
            )
        },
        (), DATA, ("retain set holds forget content", "1 of 10"),
    ),
    # ---- scorers
    "one scorer": (plain(scorer=("tfidf",)), (), RECIPE, ("two scorers or more", "tfidf")),
    "one scorer twice": (
        plain(scorer=("tfidf", "tfidf")), (), RECIPE, ("two scorers or more", "tfidf, tfidf"),
    ),
    "unknown scorer": (
        plain(scorer=("tfidff", "words")), (), RECIPE, ("'tfidff'", "did you mean 'tfidf'?"),
    ),
    "missing word list": (
        plain(scorer=("tfidf", "words:/no/words.txt")), (), DATA, ("/no/words.txt cannot be read",),
    ),
    "empty word list": (
        lambda _world, folder: {
            "scorer": ("tfidf", f"words:{write_lines(folder / 'w.txt', [''])}"),
        },
        (), DATA, ("w.txt is empty",),
    ),
    "labels that do not say what is toxic": (
        classifier(("LABEL_0", "LABEL_1")),
        (), DATA, ("do not say which one means toxic", "LABEL_0, LABEL_1", "#label=NAME"),
    ),
    "a label that the classifier lacks": (
        classifier(("good", "bad"), "hf:{}#label=evil"), (), DATA, ("good, bad", "'evil'"),
    ),
    "no classifier": (plain(scorer=("tfidf", "hf:/no/judge")), (), MODEL, ("/no/judge",)),
    # ---- probes
    "no probe tells": (alike, (), DATA, ("well enough", "layer 0: 0.", "n 38")),
    "a probe at chance": (
        alike, ("--set", "probe_layers=[1,2]"), DATA, ("at chance", "layer 1: 0.", "layer 2: 0."),
    ),
    "probe layer out of range": (
        plain(), ("--set", "probe_layers=[1,9]"), RECIPE, ("layer 9", "0 to 3"),
    ),
    "no probe layer": (plain(), ("--set", "probe_layers=[]"), RECIPE, ("probe_layers",)),
    "trained above what is read": (
        plain(), ("--set", "probe_layers=[1]", "--set", "trained_layers=[2]"),
        RECIPE, ("trained_layers [2]",),
    ),
    "weights of another number": (
        plain(), ("--set", "probe_layers=[1,2]", "--set", "layer_weights=[1,2,3]"),
        RECIPE, ("for layers [1, 2]",),
    ),
    "weights below zero": (
        plain(), ("--set", "probe_layers=[1,2]", "--set", "layer_weights=[1,-1]"),
        RECIPE, ("for layers [1, 2]", "0 or more"),
    ),
    "unknown kind of probe": (plain(), ("--set", "probe=svm"), RECIPE, ("probe", "'svm'", "lda")),
    "threshold below chance": (
        plain(), ("--set", "probe_threshold=0.4"), RECIPE, ("probe_threshold", "0.5"),
    ),
    # ---- objectives and edits
    "unknown mode": (
        plain(), ("--set", "objective_settings.mode=erase"),
        RECIPE, ("'erase'", "suppress, reverse"),
    ),
    "unknown objective": (
        plain(objective="multi-probe"), (), RECIPE, ("'multi-probe'", "multi-layer-probe"),
    ),
    "unknown edit": (plain(objective="prof"), (), RECIPE, ("'prof'", "did you mean 'profs'?")),
    "dpo of labelled texts": (
        lambda world, _folder: {"pairs": None, "labelled": world.labelled, "objective": "dpo"},
        (), DATA, ("dpo needs pairs", "--pairs"),
    ),
    "dpo for knowledge": (
        lambda world, _folder: {
            "function": "knowledge", "forget": world.forget, "objective": "dpo",
            "pairs": None, "prompts": None,
        },
        (), DATA, ("dpo needs pairs",),
    ),
    "npo without strength": (
        plain(objective="npo"), ("--set", "objective_settings.beta=0"),
        RECIPE, ("beta", "above 0"),
    ),
    "profs of labelled texts": (
        lambda world, _folder: {"pairs": None, "labelled": world.labelled, "objective": "profs"},
        (), DATA, ("pairs",),
    ),
    "profs of no rank": (
        plain(objective="profs"), ("--set", "objective_settings.rank=0"), RECIPE, ("rank",),
    ),
    "unknown setting of an edit": (
        plain(objective="profs"), ("--set", "objective_settings.ranks=2"),
        RECIPE, ("'ranks'", "did you mean 'rank'?"),
    ),
    # ---- measuring
    "no samples": (plain(), ("--set", "samples=0"), RECIPE, ("samples", "1")),
    "negative temperature": (plain(), ("--set", "temperature=-1"), RECIPE, ("temperature", "-1")),
    "no new tokens": (plain(), ("--set", "new_tokens=0"), RECIPE, ("new_tokens", "1")),
    "no prompts at all": (
        lambda _world, folder: {
            "prompts": None,
            "pairs": write_pairs(
                folder / "p.tsv",
                [(f"{rude} {RUDE[0]}", polite)
                 for rude, polite in zip(RUDE * 4, POLITE, strict=True)],
            ),
        },
        (), DATA, ("nothing to prompt the model with", "--prompts"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(cli, world, tmp_path, case):
    changes, more, code, said = CASES[case]
    out = tmp_path / "out"
    result = cli(*world.rude_args(out, *more, **changes(world, tmp_path)))
    check(result, code, *said)
    assert not out.exists()


def test_a_prompt_longer_than_the_context(cli, world, tmp_path):
    """Refused before anything is trained; fewer new tokens leave room for it."""
    texts = [*sentences(9, seed=33), " ".join(POLITE[: CONTEXT - 2])]
    prompts = write_lines(tmp_path / "long.txt", texts)
    out = tmp_path / "out"
    result = cli(*world.rude_args(out, prompts=prompts))
    check(result, DATA, f"{CONTEXT - 2} tokens", f"up to {CONTEXT - 5}", "fewer new")
    assert not out.exists()
    # A prompt of two tokens less than the context has room for two.
    mended = cli(*world.rude_args(out, "--set", "new_tokens=2", prompts=prompts))
    assert mended.code == 0, mended.err


def test_rows_that_lack_a_wording_are_left_out_and_counted(cli, world, tmp_path):
    lines = world.pairs.read_text().splitlines()
    pairs = write_lines(tmp_path / "pairs.tsv", [*lines, "w51 w52 w53 w54\t", "\tw1 w2"])
    result = cli(*world.rude_args(tmp_path / "out", "--json", pairs=pairs))
    assert result.code == 0, result.err
    (note,) = [n for n in result.json["provenance"]["notes"] if "pairs.tsv" in n]
    assert "2 " in note
    assert note.split(": ", 1)[1] in result.err


def test_bad_data_of_a_finished_run(cli, world, tmp_path):
    """Pairs that have changed since are refused, as all data is."""
    pairs = tmp_path / "pairs.tsv"
    pairs.write_bytes(world.pairs.read_bytes())
    out = tmp_path / "out"
    assert cli(*world.rude_args(out, "--set", "evaluate=false", pairs=pairs)).code == 0
    with pairs.open("a") as file:
        file.write("w51 w52 w53\tw1 w2 w3\n")
    result = cli(*world.rude_args(out, pairs=pairs))
    check(result, DATA, "data has changed", str(pairs))
    assert (out / "patch.safetensors").exists()
