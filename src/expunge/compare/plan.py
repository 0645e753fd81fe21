"""What a comparison runs: methods × functions × seeds, as ordinary recipes.

The settings of each method are chosen once for each function, on validation, by a search of as many
whole runs for all (`ComparisonPlan.trials`), with a seed of its own. Every seed then trains with
these, and takes its best look at validation. A learned trade-off has its policy taught once
instead, by episodes of as many steps as the search. An edit without training tries its own few
choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expunge.comparison.comparison import OWN
from expunge.demo import demo_recipe, toxicity_recipe, write_world
from expunge.edits import EDITS
from expunge.errors import RecipeError
from expunge.functions import FUNCTIONS as REGISTERED
from expunge.learning import method_of
from expunge.model.control import CONTROL
from expunge.recipe import Recipe, merge_overrides, read_settings
from expunge.registry import nearest, settings_of
from expunge.training.tradeoff import steps_of_action, steps_of_episode

LEARNED = " (learned)"
METHODS = (
    "cosine-rmu",
    "cosine-rmu (learned)",
    "rmu",
    "adaptive-rmu",
    "rerouting",
    "multi-layer-probe",
    "single-layer-probe",
    "graddiff",
    "npo",
    "simnpo",
    "dpo",
    "profs",
    CONTROL,
)
QUICK = ("cosine-rmu", "rmu", "multi-layer-probe", "npo")
FUNCTIONS = ("knowledge", "toxicity")
RMU: dict[str, Any] = {"retain_weight": 5.0, "objective_settings": {"coefficient": 100.0}}
ADAPTIVE: dict[str, Any] = {"retain_weight": 20.0}
# Of the search; no cell is trained with it.
CHOICE_SEED = 1000
# Settings of a recipe that a comparison decides itself.
DECIDED = (
    "objective tradeoff episodes policy_from seed evaluate measure_on measure_probes"
).split()


class ComparisonPlan(BaseModel):
    """A comparison. Every field has a description."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    functions: dict[str, dict[str, Any]] = Field(
        min_length=1, description="function -> settings of a recipe: model, data, steps"
    )
    methods: tuple[str, ...] = Field(METHODS, min_length=1, description="what is compared")
    own: dict[str, str] = Field(OWN, description="function -> the objective made for it")
    settings: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="method -> function -> settings that differ"
    )
    seeds: int = Field(5, ge=1, description="runs of each cell")
    first_seed: int = Field(0, ge=0, description="of these runs; a later one for fresh seeds")
    trials: int = Field(8, ge=1, description="whole runs behind the choice of settings")
    interference_seeds: int = Field(3, ge=0, description="seeds of two functions at once")

    @property
    def seeds_run(self) -> range:
        """The seeds of each cell."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @classmethod
    def load(cls, path: Path) -> ComparisonPlan:
        """Read a YAML file. Raises RecipeError for an unknown key or an unfit value."""
        return cls.build(read_settings(path))

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> ComparisonPlan:
        """Validate settings, the recipes within included. Raises RecipeError."""
        try:
            plan = cls.model_validate(dict(settings))
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0]) if first["loc"] else ""
            raise RecipeError(
                what=f"The comparison's {key or 'settings'} cannot be used",
                got=repr(first.get("input")),
                allowed=str(first["msg"]),
                fix="its keys are " + ", ".join(cls.model_fields),
            ) from None
        plan.check()
        return plan

    def check(self) -> None:
        """Raise RecipeError for a method, function or setting that is not there."""
        if CHOICE_SEED in self.seeds_run:
            raise RecipeError(
                what="A cell cannot have the seed that settings are chosen with",
                got=f"seeds {self.seeds_run[0]} to {self.seeds_run[-1]}",
                allowed=f"seeds without {CHOICE_SEED}",
                fix="set first_seed or seeds so that it is left out",
            )
        for function in (*self.functions, *self.own):
            REGISTERED.get(function)
        for method, by_function in self.settings.items():
            method_of(self.recipe(next(iter(self.functions)), method))
            for function in by_function:
                REGISTERED.get(function)
        for function in self.functions:
            for method in self.methods:
                self._check_decided(function, method)
                if method != CONTROL:
                    recipe = self.recipe(function, method)
                    settings_of(method_of(recipe), recipe.objective_settings)
        for function, method in self.own.items():
            if function in self.functions:
                self._check_own(function, method)

    def _check_own(self, function: str, method: str) -> None:
        """A function's own objective is tested against the others, and trained with other ones."""
        if method not in self.methods:
            raise RecipeError(
                what=f"The objective made for {function} is not among the methods",
                got=repr(method),
                allowed=", ".join(self.methods),
                fix=nearest(method, self.methods),
            )
        taught = method.endswith(LEARNED) and self.interference_seeds > 0
        if method == CONTROL or method in EDITS or taught:
            raise RecipeError(
                what=f"What is made for {function} cannot be trained with other objectives",
                got=repr(method),
                allowed="an objective with settings of its own; `expunge ls` lists them",
                fix="name another under own, or set interference_seeds to 0 for a learned one",
            )

    def _check_decided(self, function: str, method: str) -> None:
        given = {**self.functions[function], **self.settings.get(method, {}).get(function, {})}
        for key in DECIDED:
            if given.get(key) is not None:
                raise RecipeError(
                    what=f"A comparison sets {key} itself",
                    got=f"{key}: {given[key]!r} for {method} on {function}",
                    allowed=f"settings of a recipe without {', '.join(DECIDED)}",
                    fix=f"leave {key} out; methods, seeds and trials are settings of the plan",
                )

    def recipe(self, function: str, method: str) -> Recipe:
        """A method's recipe for a function, before anything is chosen."""
        name = method.removesuffix(LEARNED)
        own = self.settings.get(method, {}).get(function, {})
        return Recipe.build(
            {**self.functions[function], "function": function, "objective": name, **own}
        )

    def choice(self, function: str, method: str) -> Recipe | None:
        """The search behind a method's settings, or what teaches its policy; None: neither.

        Episodes are as many as make, with the run that follows them, the steps of a search; the
        first is as long as a run.
        """
        if method == CONTROL:
            return None
        recipe = self.recipe(function, method).updated(seed=CHOICE_SEED, evaluate=False)
        entry = method_of(recipe)
        if entry.name in EDITS and not entry.extras["choices"]:
            return None
        if not method.endswith(LEARNED):
            return recipe.updated(tradeoff="search", episodes=self.trials)
        action = steps_of_action(recipe.action_every, recipe.steps)
        steps = steps_of_episode(recipe.episode_steps, recipe.steps, action)
        episodes = 1 + max(1, round((self.trials - 2) * recipe.steps / steps))
        return recipe.updated(tradeoff="learned", episodes=episodes)


def settled(recipe: Recipe, choice: Path, training: Mapping[str, Any]) -> Recipe:
    """The recipe of a seed, with what its search chose; one whole run that is looked at.

    Args:
        choice: folder of the search, or of what taught the policy.
        training: of its record.
    """
    explored = training["tradeoff"]
    chosen = explored["chosen"]
    if "calibration" in training:  # what was chosen belongs to the layer that it was tried on
        recipe = recipe.updated(layer=training["calibration"]["layer"])
    if explored["kind"] == "learned":
        return recipe.updated(tradeoff="learned", policy_from=str(choice))
    if "settings" in chosen:  # of an edit
        own = {**recipe.objective_settings, **chosen["settings"]}
        return recipe.updated(objective_settings=own)
    knobs = dict(explored["tried"][chosen["episode"]]["knobs"])
    changes = {name: knobs.pop(name) for name in ("lr", "retain_weight") if name in knobs}
    own = {**recipe.objective_settings, **knobs}
    return recipe.updated(tradeoff="search", episodes=1, objective_settings=own, **changes)


def miniature_settings(data: Path, *, quick: bool = False) -> dict[str, Any]:
    """The built-in comparison, as a plan file would have it.

    Args:
        data: where the miniature's world lies, or will lie (`write_miniature`).
    """
    refusals = {"refusals": str(data / "refusals.txt")}
    common: dict[str, Any] = {"action_every": 12, "front_size": 2, "calibrate": False}
    common["steps"] = 48 if quick else 60
    common["cache_gib"] = 0.25  # enough for the largest cut
    base: dict[str, Any] = {"tradeoff": "fixed", "lr": "auto", "retain_weight": None}
    base |= {"objective": None, "objective_settings": {}, "layer": "auto", **common}
    few = (
        {"methods": QUICK, "seeds": 3, "trials": 2, "interference_seeds": 0}
        if quick
        else {"trials": 5}
    )
    settings: dict[str, dict[str, dict[str, Any]]] = {
        # Of as many steps as a search, enough episodes to learn from, each of two actions.
        f"cosine-rmu{LEARNED}": {
            name: {"episode_steps": 12, "action_every": 6} for name in FUNCTIONS
        },
        # What wants pairs is given the same beginnings with an answer that tells nothing.
        **{name: {"knowledge": refusals} for name in ("dpo", "profs")},
        # Published coefficients and weights are those of 7B models; a search around them
        # would find nothing here (LOG.md).
        "rmu": dict.fromkeys(FUNCTIONS, RMU),
        "adaptive-rmu": dict.fromkeys(FUNCTIONS, ADAPTIVE),
    }
    return {
        "functions": {
            "knowledge": _plain(demo_recipe(data).updated(**base)),
            "toxicity": _plain(toxicity_recipe(data).updated(**base)),
        },
        "settings": settings,
        **few,
    }


def miniature_plan(
    data: Path, *, quick: bool = False, overrides: Sequence[str] = ()
) -> ComparisonPlan:
    """The built-in comparison; the miniature's world is written to ``data``.

    Args:
        overrides: ``key=value`` of ``--set``.
    """
    settings = merge_overrides(miniature_settings(data, quick=quick), list(overrides))
    plan = ComparisonPlan.build(settings)
    write_world(data)
    return plan


def _plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
