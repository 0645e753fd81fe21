"""Probes of a base's layers: fitted once for all runs on it, and anew on what a run left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from expunge.cuts import Opened, Tokens
from expunge.errors import DataError
from expunge.probes.fit import fit_probes
from expunge.probes.probe import Probe
from expunge.progress import Progress, timed
from expunge.recipe import Recipe
from expunge.steering import probed_layers


class Probing:
    """Fits probes: forget texts against the other class, or the retain texts.

    Args:
        n_layers: of the base.
        paired: whether each forget text has a wording of its own in the other class.
        open_base: (directory or hub name, number of layers or None for all and the head) -> base.
        tokens: recipe -> its training texts.
        progress: told what is going on.
        timing: seconds are added here.
    """

    def __init__(
        self,
        n_layers: int,
        *,
        paired: bool,
        open_base: Callable[[str, int | None], Opened],
        tokens: Callable[[Recipe], Tokens],
        progress: Progress,
        timing: dict[str, float],
    ) -> None:
        self.n_layers, self.paired = n_layers, paired
        self.open_base, self.tokens = open_base, tokens
        self.progress, self.timing = progress, timing
        self._probes: dict[tuple[Any, ...], tuple[Probe, ...]] = {}

    def probes(self, recipe: Recipe, *, whole: bool = False) -> tuple[Probe, ...]:
        """Probes of the layers that a recipe asks for, on the base.

        Args:
            whole: open the base with all layers and its head, if it has to be opened.
        """
        layers = probed_layers(recipe, self.n_layers)
        depth = None if whole else max(layers) + 1
        return self._of_base(recipe, layers, lambda: self.open_base(recipe.model, depth))

    def accuracy(self, recipe: Recipe, artefact: Any, opened: Opened) -> dict[str, Any]:
        """Held-out accuracy of a probe at each layer, on the base and on what a run left.

        New probes are fitted for either, so that what is still there is found again.

        Args:
            artefact: a patch or an intervention.
            opened: the whole base.

        Returns:
            ``before`` and ``after``: [layer, accuracy] of every layer; ``reason`` alone where
            there are too few texts for probes.
        """
        layers = tuple(range(self.n_layers))
        try:
            before = self._of_base(recipe, layers, lambda: opened)
            with artefact.applied(opened.model):
                after = self._fitted(recipe, opened, layers)
        except DataError as error:
            return {"reason": f"{error.what} ({error.got})"}
        return {
            name: [[probe.layer, probe.accuracy] for probe in probes]
            for name, probes in (("before", before), ("after", after))
        }

    def _of_base(
        self, recipe: Recipe, layers: tuple[int, ...], open_base: Callable[[], Opened]
    ) -> tuple[Probe, ...]:
        key = (recipe.probe, recipe.probe_pooling, layers, recipe.max_tokens)
        if key not in self._probes:
            self._probes[key] = self._fitted(recipe, open_base(), layers)
        return self._probes[key]

    def _fitted(self, recipe: Recipe, opened: Opened, layers: tuple[int, ...]) -> tuple[Probe, ...]:
        tokens = self.tokens(recipe)
        toxic = [ids for topic in tokens.forget for ids in topic]
        total = len(toxic) + len(tokens.contrast)
        with timed(self.timing, "probe"), self.progress.phase("probe", total) as advance:
            return fit_probes(
                opened.model,
                opened.structure,
                toxic,
                tokens.contrast,
                layers=layers,
                kind=recipe.probe,
                pooling=recipe.probe_pooling,
                paired=self.paired,
                on_progress=advance,
            )
