"""Episodes of one recipe on one bench: played, taken in again, learned from.

Every episode starts from the base's own weights, on the boundaries that all runs share, and is
looked at on validation after each action. The first keeps to the usual values and is as long as a
run: it is there to fall back on. A few short ones then draw their knobs evenly, and a policy begins
where most was gained; the rest explore around it and teach it. The test split is not read here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from expunge.errors import DivergedError, RecipeError
from expunge.evaluation.looks import LookKind, OutputLook
from expunge.evaluation.pareto import hypervolume
from expunge.learning import Learning, objective_of
from expunge.metalearning.archive import Archive
from expunge.metalearning.episodes import Ended, Episode, Role, lessons
from expunge.metalearning.looking import Look, kind_of, knob_ranges, look_at
from expunge.metalearning.searching import trial
from expunge.recipe import Recipe
from expunge.training.checks import is_finite
from expunge.training.loop import Stage, TrainingResult
from expunge.training.policy import Explorer, Policy, PolicySettings, Trajectory, features
from expunge.training.tradeoff import (
    Actor,
    Learned,
    Scale,
    scales_of,
    steps_of_action,
    steps_of_episode,
)
from expunge.training.watch import Point, Watch

# What hypervolume below the floor counts in what the policy learns from: enough to tell apart those
# that get no further, too little to be worth a loss of the rest.
BELOW = 0.01
# Episodes that one policy plays after its first update. Two keep two cores busy; the number does
# not follow the machine, so that neither does what is learned.
TOGETHER = 2


@dataclass
class Episodes:
    """Plays episodes of one recipe on one bench.

    Attributes:
        archive: of the patches worth keeping; None: nothing is kept.
    """

    learning: Learning
    recipe: Recipe
    archive: Archive | None = None
    policy_settings: PolicySettings = field(default_factory=PolicySettings)
    played: list[Episode] = field(default_factory=list)

    @property
    def kind(self) -> LookKind:
        """What looks measure."""
        return kind_of(self.recipe)

    @cached_property
    def look(self) -> Look:
        """What is looked at; opens what it needs, so it comes before everything else."""
        return look_at(self.learning, self.recipe, self.kind)

    @property
    def base(self) -> dict[str, float]:
        """What looks measure of the base, part by part."""
        return self.look.base if isinstance(self.look, OutputLook) else {}

    @cached_property
    def usual(self) -> dict[str, Any]:
        """What a run without learning would use."""
        _ = self.look
        return self.learning.usual(self.recipe)

    @cached_property
    def scales(self) -> tuple[Scale, ...]:
        """Of the knobs that may move."""
        return scales_of(objective_of(self.recipe).extras["knobs"], self.usual)

    @property
    def count(self) -> int:
        """Episodes to be played; none where another run's have taught the policy."""
        return 0 if self.recipe.policy_from else self.recipe.episodes

    @cached_property
    def taught(self) -> list[Episode]:
        """Another run's episodes.

        Raises RecipeError if there are none, or of other looks or knobs.
        """
        if not self.recipe.policy_from:
            return []
        episodes = lessons(Path(self.recipe.policy_from), self.kind, knob_ranges(self.recipe))
        own = [scale.knob.name for scale in self.scales]
        other = next((list(k) for one in episodes for k in one.knobs if list(k) != own), None)
        if other is not None:
            raise RecipeError(
                what="The policy that policy_from names sets other knobs than this run has",
                got=", ".join(other),
                allowed=", ".join(own),
                fix="name a run of the same objective, or leave policy_from out",
            )
        return episodes

    @property
    def searches(self) -> bool:
        """Whether knobs are tried at random, with nothing to be learned."""
        return self.recipe.tradeoff == "search"

    @property
    def steps(self) -> int:
        """Inner steps of a short episode; a search tries whole runs."""
        recipe = self.recipe
        if self.searches:
            return recipe.steps
        return steps_of_episode(recipe.episode_steps, recipe.steps, self.action_steps)

    @property
    def action_steps(self) -> int:
        """Inner steps of an action, after which there is a look."""
        return steps_of_action(self.recipe.action_every, self.recipe.steps)

    @cached_property
    def policy(self) -> Policy:
        """At first, the policy around what a run without learning uses.

        With another run's episodes, its policy: learned from them again.
        """
        policy = self._begun([])
        for number in range(len(self.taught)):
            policy = self._after(policy, self.taught[: number + 1])
        return policy

    def play(
        self,
        actor: Actor,
        number: int,
        *,
        steps: int | None = None,
        seed: int | None = None,
        stage: Stage | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> tuple[Episode, TrainingResult]:
        """One episode with this actor, and its result, without weights where training broke off.

        Args:
            steps: if not those of this episode.
            seed: of the batches and the target, if not the recipe's.
            stage: where the state is kept, for the last run.
        """
        recipe = self.recipe if seed is None else self.recipe.updated(seed=seed)
        look, every = self.look, self.action_steps
        rule = Learned(self.scales, actor, every, self.usual["retain_weight"])
        watch = Watch(
            look,
            every,
            self.recipe.collapse_floor,
            retain_floor=self.recipe.retain_floor,
            keep_best=stage is not None,
            on_point=lambda done, point, weights: self._keep(number, done, point, weights),
        )
        steps = steps or self.steps_of(number)
        trainer = self.learning.trainer(recipe, rule, watch, steps=steps)
        start = time.perf_counter()
        ended: Ended = "whole"
        try:
            result = trainer.run(stage or Stage(), lambda _log: on_step())
        except DivergedError:
            # One that diverges is a bad one, not the end: the archive holds what others found.
            result = TrainingResult({}, (), trainer.micro_batch_size)
            ended = "diverged"
        if watch.collapsed is not None:
            ended = "collapsed"
        role = self.role_of(number) if stage is None else "last"
        episode = replace(self._episode(number, role, rule, watch), ended=ended)
        if role == "last" and result.log:
            # One that was resumed took its first actions before.
            episode = replace(episode, knobs=tuple(one.knobs for one in result.log[::every]))
        return replace(episode, seconds=time.perf_counter() - start), result

    def take(self, episode: Episode) -> None:
        """Take in an episode that was played elsewhere, or before: its patches are there."""
        self.learn(episode)
        for done, point in episode.points.items():
            self._keep(episode.number, done, point, None)

    def learn(self, episode: Episode) -> None:
        """Update the policy by what an episode showed, and all before it."""
        self.played.append(episode)
        if not self.searches:
            self.policy = self._after(self.policy, self.played)
            if self._begins_round(len(self.played)):
                self.acting = self.policy

    @cached_property
    def acting(self) -> Policy:
        """The policy that plays the next episode: as it was when that one's round began."""
        return self.policy

    @property
    def round(self) -> range:
        """Numbers of the episodes that are left of a round: none needs what another teaches.

        The first round is all before the policy begins, the second all before its first update;
        trials of a search are one round.
        """
        start = len(self.played)
        after = range(start + 1, self.count)
        ends = [] if self.searches else [n for n in after if self._begins_round(n)]
        return range(start, min(ends, default=self.count))

    def _begins_round(self, number: int) -> bool:
        beyond = number - self.least
        return number == self.first or (beyond >= 0 and beyond % TOGETHER == 0)

    @property
    def first(self) -> int:
        """Number of the first episode that the policy plays."""
        return 1 + self.policy_settings.drawn

    @property
    def least(self) -> int:
        """Episodes before the policy is first updated."""
        return self.first + self.policy_settings.warm_up

    @property
    def teaching(self) -> list[Trajectory]:
        """What there is to learn from: another run's episodes, or these."""
        return _trajectories(self.taught or self.played)

    def _after(self, policy: Policy, seen: Sequence[Episode]) -> Policy:
        """The policy, once the last of these has been seen too."""
        if seen[-1].role == "explored":
            return policy.updated(_trajectories(seen))
        return self._begun(seen)

    def _begun(self, seen: Sequence[Episode]) -> Policy:
        """A policy around the usual values, or those drawn that gained more in as many steps.

        A policy that begins where nothing is forgotten, or everything is lost, has nothing to learn
        from (LOG.md, "Where a policy begins"). What ended early is no place to begin.
        """
        places, most = [scale.start for scale in self.scales], 0.0
        for one in seen:
            if one.role == "usual":
                most = one.returns[0] if one.ended == "whole" or one.steps > self.steps else 0.0
            elif one.ended == "whole" and one.returns[0] > most:
                places, most = list(one.places[0]), one.returns[0]
        return Policy.starting(places, self.policy_settings)

    def note(self) -> str:
        """How far the exploration is, in a few words."""
        if self.archive is None or not self.archive.entries:
            return ""
        points = [entry.point for entry in self.archive.entries]
        best = self.archive.best.point
        whole = hypervolume(points, self.recipe.retain_floor)
        return (
            f"hypervolume {whole:.3f}, {len(points)} on the front, "
            f"best: forget {best.forget:.2f}, retain {best.retain:.2f}"
        )

    def role_of(self, number: int) -> Role:
        """What an episode is for; the first is a yardstick."""
        if self.searches:
            return "trial"
        if number == 0:
            return "usual"
        return "drawn" if number < self.first else "explored"

    def actor(self, number: int) -> Actor:
        """That of an episode: a search's, with the usual values first, or one around the policy."""
        if self.role_of(number) != "explored":
            return trial(self.scales, self.recipe.seed, number)
        return Explorer(self.acting, np.random.default_rng([self.recipe.seed, number]))

    def steps_of(self, number: int) -> int:
        """Inner steps of an episode; the yardstick is a whole run."""
        return self.recipe.steps if number == 0 else self.steps

    def _keep(self, number: int, done: int, point: Point, weights: Any) -> None:
        # A model that is broken shows a retain of 0, whoever took the look.
        sound = point.retain > 0 and (weights is None or is_finite(weights))
        if self.archive is not None and sound:
            self.archive.add(number, done, point, weights)

    def _episode(self, number: int, role: Role, rule: Learned, watch: Watch) -> Episode:
        seen = [point for _, point in sorted(watch.points.items())]
        episode = Episode(
            number=number,
            role=role,
            steps=max(watch.points, default=0),
            knobs=tuple(rule.values(a) for a in sorted(rule.places)),
            points=dict(watch.points),
            reward=hypervolume(seen, self.recipe.retain_floor),
        )
        if role == "last":
            return episode
        if role == "usual":
            early = [point for done, point in watch.points.items() if done <= self.steps]
            return replace(episode, returns=(self._gain(early),))
        # What an action gained is what was not yet had when it was taken.
        whole = self._gain(seen)
        returns = [whole - self._gain(seen[:a]) for a in range(len(rule.places))]
        seen_AF = np.array([features(rule.states[a]) for a in sorted(rule.places)])
        places_AK = np.array([rule.places[a] for a in sorted(rule.places)])
        explorer = rule.actor if isinstance(rule.actor, Explorer) else None
        return replace(
            episode,
            features=_rows(seen_AF),
            places=_rows(places_AK),
            returns=tuple(returns),
            log_density=explorer.policy.log_density(seen_AF, places_AK) if explorer else 0.0,
        )

    def _gain(self, points: Sequence[Point]) -> float:
        """Hypervolume above the floor, and a share of that above none.

        Most early episodes lie below the floor, where the first is 0 for all of them.
        """
        floor = self.recipe.retain_floor
        return hypervolume(points, floor) + BELOW * hypervolume(points, 0.0)


def _trajectories(seen: Sequence[Episode]) -> list[Trajectory]:
    return [one.trajectory for one in seen if one.role == "explored"]


def _rows(arrays: Any) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, array)) for array in arrays)
