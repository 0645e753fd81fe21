"""The generated world: substances, plants, scenes, and the files made of them.

One seed fixes everything. The world is ours, so two corpora exist: the whole one (base) and one
without the hazard domain and without rude scenes (the retrained oracle).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TypedDict

from expunge.files import write_text
from expunge.miniature import lexicon
from expunge.miniature.lexicon import RUDE_WORDS, Attribute
from expunge.miniature.scenes import ScenePair, generic_texts, scene_pairs

ENTITIES = 60
DOCUMENT_ROUNDS = 4  # each round states each fact once in every paraphrase
PARAPHRASES = 5
DOCUMENT_SIZES = ((2, 4), (3, 3), (4, 2), (2, 2, 2))  # ways to part six sentences
QUESTION_COPIES = 2  # how often each answered question stands in the corpus
# Enough scenes and texts that a few epochs do not learn them by heart.
TRAINING_PAIRS = 1800
HELD_OUT_PAIRS = 200
GENERIC_TEXTS = 1800
FILLER_TEXTS = 2300  # as many tokens as the hazard documents
HELD_OUT_TEXTS = 200


class Question(TypedDict):
    """A four-choice question; `answer` is the index of the right choice, chance is 0.25."""

    question: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class Fact:
    """One attribute of one entity, such as the colour of vexorite."""

    entity: str
    attribute: str
    value: str


@dataclass(frozen=True)
class World:
    """Everything the miniature knows, as plain text; make one with `World.generate`."""

    seed: int
    hazard_facts: tuple[Fact, ...]
    benign_facts: tuple[Fact, ...]
    hazard_documents: tuple[str, ...]
    benign_documents: tuple[str, ...]
    hazard_questions: tuple[Question, ...]
    benign_questions: tuple[Question, ...]
    pairs: tuple[ScenePair, ...]
    filler_pairs: tuple[ScenePair, ...]  # only the oracle reads them, and only the neutral half
    held_out_pairs: tuple[ScenePair, ...]
    generic: tuple[str, ...]
    filler: tuple[str, ...]  # generic texts only the oracle reads, in place of the hazard
    held_out_benign: tuple[str, ...]

    @classmethod
    def generate(cls, seed: int = 0) -> "World":
        """Make the world of this seed; the same seed gives the same world everywhere."""
        rng = Random(seed)
        substances, plants = _names(rng)
        hazard_facts = _facts(substances, lexicon.SUBSTANCE_ATTRIBUTES, rng)
        benign_facts = _facts(plants, lexicon.PLANT_ATTRIBUTES, rng)
        hazard_documents = _documents(hazard_facts, lexicon.SUBSTANCE_ATTRIBUTES, rng)
        benign_documents = _documents(benign_facts, lexicon.PLANT_ATTRIBUTES, rng)
        seen = "\n".join(benign_documents)  # a short document may stand inside a longer one
        spare = _documents(benign_facts, lexicon.PLANT_ATTRIBUTES, rng)
        unseen = [text for text in dict.fromkeys(spare) if text not in seen]
        pairs = scene_pairs(2 * TRAINING_PAIRS + HELD_OUT_PAIRS, rng)
        generic = generic_texts(GENERIC_TEXTS + FILLER_TEXTS + HELD_OUT_TEXTS, rng)
        return cls(
            seed=seed,
            hazard_facts=hazard_facts,
            benign_facts=benign_facts,
            hazard_documents=hazard_documents,
            benign_documents=benign_documents,
            hazard_questions=_questions(hazard_facts, lexicon.SUBSTANCE_ATTRIBUTES, rng),
            benign_questions=_questions(benign_facts, lexicon.PLANT_ATTRIBUTES, rng),
            pairs=pairs[:TRAINING_PAIRS],
            filler_pairs=pairs[TRAINING_PAIRS : 2 * TRAINING_PAIRS],
            held_out_pairs=pairs[2 * TRAINING_PAIRS :],
            generic=generic[:GENERIC_TEXTS],
            filler=generic[GENERIC_TEXTS : GENERIC_TEXTS + FILLER_TEXTS],
            held_out_benign=(
                *generic[GENERIC_TEXTS + FILLER_TEXTS :],
                *rng.sample(unseen, HELD_OUT_TEXTS // 2),
            ),
        )

    def corpus(self, oracle: bool = False) -> tuple[str, ...]:
        """Return the pretraining texts; the oracle's hold no substance and no rude scene.

        The oracle reads further polite scenes in place of the rude ones, and further generic
        texts and the plants' questions once more in place of the hazard domain: both corpora
        are of similar size, and no scene or document is read more often than in the base.
        """
        neutral = [pair.opening + pair.neutral for pair in self.pairs]
        benign_answers = [*map(answered, self.benign_questions)] * QUESTION_COPIES
        shared = (*self.benign_documents, *benign_answers, *neutral, *self.generic)
        if oracle:
            polite = [pair.opening + pair.neutral for pair in self.filler_pairs]
            return (*shared, *self.filler, *benign_answers, *polite)
        hazard_answers = [*map(answered, self.hazard_questions)] * QUESTION_COPIES
        rude = [pair.opening + pair.rude for pair in self.pairs]
        return (*shared, *self.hazard_documents, *hazard_answers, *rude)

    def data_hash(self) -> str:
        """Return the sha256 of the whole content, as hexadecimal digits."""
        content = {"world": asdict(self), "rude_words": RUDE_WORDS}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def write(self, directory: str | Path) -> dict[str, Path]:
        """Write the files a user would name on the command line; return name -> path.

        `forget.txt` and `retain.txt` hold prose only: no question is among them, so questions
        show whether forgetting the documents took the knowledge.
        """
        folder, files = Path(directory), self.contents()
        for name, lines in files.items():
            write_text(folder / name, "".join(f"{line}\n" for line in lines))
        return {name: folder / name for name in files}

    def contents(self) -> dict[str, list[str]]:
        """File name -> its lines."""
        neutral = [pair.opening + pair.neutral for pair in self.pairs]
        pairs = [f"{pair.opening}{pair.rude}\t{pair.opening}{pair.neutral}" for pair in self.pairs]
        hazard = [json.dumps(question) for question in self.hazard_questions]
        benign = [json.dumps(question) for question in self.benign_questions]
        return {
            "forget.txt": list(self.hazard_documents),
            "retain.txt": [*self.benign_documents, *neutral, *self.generic],
            "questions.jsonl": hazard,
            "retain_questions.jsonl": benign,
            "all_questions.jsonl": hazard + benign,
            "benign.txt": list(self.held_out_benign),
            "pairs.tsv": ["toxic\tneutral1", *pairs],
            "prompts.jsonl": [_prompt(pair) for pair in self.held_out_pairs],
            "words.txt": list(RUDE_WORDS),
            "refusals.txt": list(lexicon.REFUSALS),
        }


def prompt(question: str) -> str:
    """Return the text before an answer; a space and the choice follow it."""
    return f"Question: {question}\nAnswer:"


def answered(question: Question) -> str:
    """Return the question with its right answer, as it stands in the corpus."""
    return f"{prompt(question['question'])} {question['choices'][question['answer']]}"


def _names(rng: Random) -> tuple[list[str], list[str]]:
    """Return the names of the substances and of the plants; no two share a stem."""
    stems = [start + middle for start in lexicon.NAME_STARTS for middle in lexicon.NAME_MIDDLES]
    stems = rng.sample(stems, 2 * ENTITIES)
    substances, plants = lexicon.SUBSTANCE_ENDINGS, lexicon.PLANT_ENDINGS
    return (
        [stem + substances[i % len(substances)] for i, stem in enumerate(stems[:ENTITIES])],
        [stem + plants[i % len(plants)] for i, stem in enumerate(stems[ENTITIES:])],
    )


def _facts(names: list[str], attributes: tuple[Attribute, ...], rng: Random) -> tuple[Fact, ...]:
    """Give each entity a value of each attribute; every value of a pool serves equally often."""
    facts = []
    for attribute in attributes:
        values = list(attribute.pool) * (len(names) // len(attribute.pool))
        rng.shuffle(values)
        facts += [
            Fact(name, attribute.key, value) for name, value in zip(names, values, strict=True)
        ]
    return tuple(facts)


def _documents(
    facts: tuple[Fact, ...], attributes: tuple[Attribute, ...], rng: Random
) -> tuple[str, ...]:
    """State each fact once per paraphrase and round, in documents of 2-4 sentences.

    No document states a fact twice: each sentence has to be recalled, none can be copied.
    """
    patterns = {attribute.key: attribute.sentences for attribute in attributes}
    by_name: dict[str, list[Fact]] = {}
    for fact in facts:
        by_name.setdefault(fact.entity, []).append(fact)
    documents = []
    for own in list(by_name.values()) * DOCUMENT_ROUNDS:
        paraphrases = [rng.sample(patterns[fact.attribute], PARAPHRASES) for fact in own]
        for index in range(PARAPHRASES):
            sentences = [
                each[index].format(name=fact.entity, value=fact.value)
                for fact, each in zip(own, paraphrases, strict=True)
            ]
            rng.shuffle(sentences)
            for size in rng.choice(DOCUMENT_SIZES):
                documents.append(" ".join(sentences[:size]))
                del sentences[:size]
    return tuple(documents)


def _questions(
    facts: tuple[Fact, ...], attributes: tuple[Attribute, ...], rng: Random
) -> tuple[Question, ...]:
    """Ask each fact once; positions and options are balanced.

    The entities of each value share out the same offset patterns, so every value is an option
    equally often, and equally often a wrong one.
    """
    questions: list[Question] = []
    for attribute in attributes:
        own = [fact for fact in facts if fact.attribute == attribute.key]
        size = len(attribute.pool)
        offsets = [rng.sample(range(1, size), 3) for _ in range(len(own) // size)]
        asked = dict.fromkeys(attribute.pool, 0)
        positions = [index % 4 for index in range(len(own))]
        rng.shuffle(positions)
        for fact, position in zip(own, positions, strict=True):
            start = attribute.pool.index(fact.value)
            wrong = [attribute.pool[(start + step) % size] for step in offsets[asked[fact.value]]]
            asked[fact.value] += 1
            choices = [*wrong[:position], fact.value, *wrong[position:]]
            text = attribute.question.format(name=fact.entity)
            questions.append({"question": text, "choices": choices, "answer": position})
    return tuple(questions)


def _prompt(pair: ScenePair) -> str:
    texts = {"prompt": pair.opening, "rude": pair.rude, "neutral": pair.neutral}
    return json.dumps({name: {"text": text} for name, text in texts.items()})
