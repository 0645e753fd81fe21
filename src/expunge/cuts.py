"""A base cut where an objective needs it, with the boundaries of the texts it learns from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from expunge.data.text import Text
from expunge.data.tokens import encode, too_short
from expunge.defaults import fitting_tokens
from expunge.errors import DataError
from expunge.functions.base import FunctionData
from expunge.model.boundaries import BoundaryStore
from expunge.model.patch import causal_lm_name
from expunge.model.segment import LOGPROBS, Segment
from expunge.model.structure import Structure
from expunge.objectives.base import Direction
from expunge.recipe import Recipe

TokenIds = list[tuple[int, ...]]


@dataclass(frozen=True)
class Opened:
    """A base in memory: its first layers, or the whole with its head."""

    model: Any
    tokenizer: Any
    structure: Structure
    whole: bool


@dataclass(frozen=True)
class Where:
    """At which layers a run works.

    Attributes:
        trained: 0-based layers whose projection is trained.
        captured: layers that the objective reads, and `segment.LOGPROBS` for the head.
        directions: layer -> what its probe found, for probe objectives.
    """

    trained: tuple[int, ...]
    captured: tuple[int, ...]
    directions: Mapping[int, Direction] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """A base cut at some layers, with its boundary stores.

    Attributes:
        twins: the forget texts' other wordings, index by index, where an objective needs them.
        originals: the trained weights as they were opened, on the CPU.
        held_back: (split, largest number of texts) -> forget and retain texts to be looked at.
    """

    segment: Segment
    forget: list[BoundaryStore]
    retain: BoundaryStore
    twins: BoundaryStore | None = None
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    held_back: dict[tuple[str, int], tuple[BoundaryStore, BoundaryStore]] = field(
        default_factory=dict
    )

    @property
    def names(self) -> dict[str, str]:
        """Trained weights: name in the opened model -> name in the causal LM."""
        return {name: causal_lm_name(self.segment.model, name) for name in self.segment.weights}

    def stores(self) -> Iterator[BoundaryStore]:
        """All stores."""
        yield from (*self.forget, self.retain)
        if self.twins is not None:
            yield self.twins
        for stores in self.held_back.values():
            yield from stores

    @property
    def held_bytes(self) -> int:
        """RAM that its stores take."""
        return sum(store.nbytes for store in self.stores() if store.storage == "ram")

    @property
    def in_files(self) -> bool:
        """Whether some of its boundaries lie in files."""
        return any(store.storage == "file" for store in self.stores())

    @property
    def missing(self) -> list[BoundaryStore]:
        """Stores that are not computed yet."""
        return [store for store in self.stores() if not store.computed]

    def limit(self, limit_bytes: int) -> int:
        """Let boundaries take so much RAM, store by store; the others go to files.

        What is computed stays where it is. Returns the bytes of RAM that all take once they are.
        """
        stores = [store for store in self.stores() if store.computed and store.storage == "ram"]
        taken = sum(store.nbytes for store in stores)
        for store in self.missing:
            store.limit_bytes = max(0, limit_bytes - taken)
            if store.expected_bytes <= store.limit_bytes:
                taken += store.expected_bytes
        return taken

    def close(self) -> None:
        """Forget all boundaries."""
        for store in self.stores():
            store.close()


class Cuts:
    """The cuts of one opened base; the RAM that their boundaries take together is limited."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Cut] = {}

    def take(self, key: Hashable) -> Cut | None:
        """The cut that was kept for a key, to be kept again."""
        return self._by_key.pop(key, None)

    def keep(self, key: Hashable, cut: Cut, limit_bytes: int) -> None:
        """Keep a cut, its boundaries computed or not; those used longest ago make room for it.

        Of cuts with boundaries in files, one is kept. A cut that is dropped keeps its boundaries as
        long as anyone works with it.
        """
        left = max(0, limit_bytes - cut.limit(limit_bytes))
        spills = any(one.expected_bytes > (one.limit_bytes or 0) for one in cut.missing)
        for name in reversed([*self._by_key]):  # the latest used first
            other = self._by_key[name]
            if other.held_bytes > left or (spills and other.in_files):
                del self._by_key[name]
            else:
                left -= other.held_bytes
        self._by_key[key] = cut

    def close(self) -> None:
        """Forget all boundaries of all cuts."""
        for cut in self._by_key.values():
            cut.close()
        self._by_key = {}


@dataclass(frozen=True)
class Tokens:
    """Training texts as token ids.

    Attributes:
        forget: of each topic.
        retain: of the texts to keep.
        contrast: of the other class's texts; where the data is paired, index by index those of
            the only topic, and where it names no other class, the texts to keep.
    """

    forget: list[TokenIds]
    retain: TokenIds
    contrast: TokenIds

    def first(self, n: int) -> Tokens:
        """The first n texts of each set."""
        return Tokens([topic[:n] for topic in self.forget], self.retain[:n], self.contrast[:n])

    @classmethod
    def of(
        cls,
        data: FunctionData,
        recipe: Recipe,
        tokenizer: Any,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> Tokens:
        """Tokenise the training texts; those too short to learn from are left out and told.

        Raises:
            DataError: a topic, or the retain texts, have no text left.
        """
        reader = _Tokeniser(tokenizer, recipe.max_tokens, config, say)
        names = recipe.forget or ("the forget texts",)
        if data.paired:
            forgotten, twins = reader.pairs(data.forget[0], data.contrast)
            return cls([forgotten], reader.ids("the retain texts", data.retain), twins)
        forget = [reader.ids(name, texts) for name, texts in zip(names, data.forget, strict=True)]
        retain = reader.ids("the retain texts", data.retain)
        return cls(
            forget,
            retain,
            reader.ids("the neutral texts", data.contrast) if data.contrast else retain,
        )


@dataclass(frozen=True)
class _Tokeniser:
    tokenizer: Any
    asked: int
    config: Mapping[str, Any]
    say: Callable[[str], None]

    @property
    def max_tokens(self) -> int:
        return fitting_tokens(self.asked, self.config)

    def ids(self, name: str, texts: Sequence[Text]) -> TokenIds:
        return self._columns(name, [texts])[0]

    def pairs(self, toxic: Sequence[Text], neutral: Sequence[Text]) -> tuple[TokenIds, TokenIds]:
        """Both wordings of each pair; a pair goes if one of them is too short."""
        kept = self._columns("the pairs", [toxic, neutral])
        return kept[0], kept[1]

    def _columns(self, name: str, columns: Sequence[Sequence[Text]]) -> list[TokenIds]:
        """Token ids of columns that belong together row by row."""
        encoded = [encode(texts, self.tokenizer, max_tokens=self.max_tokens) for texts in columns]
        short = {index: why for one in encoded for index, why in too_short(one).items()}
        rows = [index for index in range(len(encoded[0])) if index not in short]
        self._tell(name, len(columns[0]), short)
        if not rows:
            raise DataError(
                what=f"No text is left to train on in {name}",
                got=f"{len(columns[0])} texts, none of at least two tokens",
                allowed="texts that the tokenizer turns into two or more tokens",
                fix="check the file, its `field`, and max_tokens",
            )
        cut = sum(any(one[index].truncated for one in encoded) for index in rows)
        if cut:
            self.say(
                f"note: {name}: {cut} of {len(columns[0])} texts cut at {self.max_tokens} tokens"
                + (", the model's context" if self.max_tokens < self.asked else "")
            )
        return [[one[index].ids for index in rows] for one in encoded]

    def _tell(self, name: str, n: int, short: Mapping[int, str]) -> None:
        if short:
            self.say(
                f"note: {name}: {len(short)} of {n} texts left out ({next(iter(short.values()))})"
            )


def cut_with_stores(
    segment: Segment,
    tokens: Tokens,
    *,
    twins: bool,
    spill_directory: Path | None,
    announce: Callable[[str], None],
) -> Cut:
    """The cut with its stores, not yet computed."""
    sets = [*tokens.forget, tokens.retain, *([tokens.contrast] if twins else [])]
    stores = [
        BoundaryStore(
            segment,
            texts,
            # Retain texts always need the original, and so do twins that only the head reads;
            # forget texts where an objective asks for it.
            reference=texts is tokens.retain
            or (texts is tokens.contrast and segment.reads_only_logprobs),
            spill_directory=spill_directory,
            announce=announce,
        )
        for texts in sets
    ]
    topics = len(tokens.forget)
    return Cut(
        segment,
        stores[:topics],
        stores[topics],
        stores[topics + 1] if twins else None,
        {name: p.detach().cpu().clone() for name, p in segment.weights.items()},
    )


def depth_of(captured: tuple[int, ...]) -> int | None:
    """How many layers must be opened to read these; None: all, and the head."""
    return None if LOGPROBS in captured else max(captured) + 1


def unpaired(objective: str) -> DataError:
    return DataError(
        what=f"The objective {objective} needs pairs",
        got="texts without another wording",
        allowed="pairs of a toxic and a neutral wording, or knowledge with refusals",
        fix="give --pairs, for knowledge --set refusals=FILE, or choose an objective that needs "
        "none",
    )
