"""Episodes on the miniature: returns add up, a diverging one counts, seeds and logs repeat."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge import miniature
from expunge.errors import RecipeError, TrainingError
from expunge.evaluation.pareto import hypervolume
from expunge.metalearning import episodes as episodes_module
from expunge.metalearning.archive import Archive, load_front
from expunge.metalearning.episodes import EPISODES_NAME, Episode, EpisodeLog, Role, lessons
from expunge.metalearning.looking import knob_ranges
from expunge.metalearning.playing import BELOW, Episodes
from expunge.model.patch import Patch
from expunge.recipe import Recipe
from expunge.training.loop import Stage
from expunge.training.policy import N_FEATURES, PolicySettings
from expunge.training.tradeoff import START, Scale, State
from expunge.training.watch import Point
from expunge.workbench import Workbench

ABSURD = 1e36
FIRST = 1 + PolicySettings().drawn  # number of the first episode that a policy plays
LEAST = FIRST + PolicySettings().warm_up  # episodes before its first update
RANGES = {"lr": [0.2, 5.0, "log", True]}


def recipe(files: dict[str, Path], **changes: Any) -> Recipe:
    """Six steps with a look after every second, a floor that small changes stay above."""
    return Recipe.build(
        {
            "model": str(miniature.base_directory()),
            "forget": str(files["forget.txt"]),
            "retain": str(files["retain.txt"]),
            "objective": "rmu",
            "tradeoff": "learned",
            "reward": "representation",
            "layer": 2,
            "steps": 6,
            "episode_steps": 6,
            "action_every": 2,
            "batch_size": 4,
            "max_texts": 40,
            "max_tokens": 32,
            "look_items": 6,
            "retain_floor": 0.5,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def bench(files: dict[str, Path]) -> Workbench:
    return Workbench(recipe(files))


def episodes(bench: Workbench, archive: Archive | None = None, **changes: Any) -> Episodes:
    return Episodes(bench.learning, bench.recipe.updated(**changes), archive)


def explored(found: Episodes, number: int) -> Episode:
    return found.play(found.actor(number), number)[0]


def timeless(episode: Episode) -> dict[str, Any]:
    return {**vars(episode), "seconds": 0}


# ---- one episode


def test_what_an_episode_tells(bench: Workbench) -> None:
    found = episodes(bench)
    episode = explored(found, FIRST)
    names = {scale.knob.name for scale in found.scales}
    assert names == {"lr", "retain_weight", "coefficient"}
    assert [*episode.points] == [2, 4, 6] and episode.steps == 6
    assert len(episode.knobs) == 3 and all(knobs.keys() == names for knobs in episode.knobs)
    assert np.array(episode.features).shape == (3, N_FEATURES)
    assert np.array(episode.places).shape == (3, len(names))
    assert episode.trajectory.log_density == found.policy.log_density(
        np.array(episode.features), np.array(episode.places)
    )
    # Each action after the first saw the look before it.
    for action, done in ((1, 2), (2, 4)):
        forget, retain = episode.points[done]
        assert episode.features[action] == pytest.approx(
            (1.0, done / 6 - 0.5, forget - 0.5, retain - 0.5)
        )


def test_returns_add_up_to_the_reward(bench: Workbench) -> None:
    """What an action and those after it gained, and what was had before, is the whole."""
    episode = explored(episodes(bench), 2)
    seen = [episode.points[done] for done in (2, 4, 6)]
    assert episode.reward == hypervolume(seen, 0.5) > 0

    def gained(points: list[Point]) -> float:
        return hypervolume(points, 0.5) + BELOW * hypervolume(points, 0.0)

    for action in range(3):
        assert episode.returns[action] == pytest.approx(gained(seen) - gained(seen[:action]))
    gains = [*(-np.diff(episode.returns)), episode.returns[-1]]
    assert sum(gains) == pytest.approx(gained(seen)) and min(gains) >= 0


def test_an_episode_leaves_the_base_as_it_was(bench: Workbench) -> None:
    found = episodes(bench)
    model = found.learning.opened(bench.recipe.model, 3).model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    explored(found, 1)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_one_seed_is_one_episode(bench: Workbench, files: dict[str, Path]) -> None:
    other = Workbench(recipe(files))
    for number in (3, FIRST):
        one, again = (explored(episodes(bench), number) for _ in range(2))
        assert timeless(one) == timeless(again)
        # On a bench of its own too, and after others.
        assert timeless(explored(episodes(other), number)) == timeless(one)
        assert explored(episodes(bench), number + 1).knobs != one.knobs
        assert explored(episodes(bench, seed=1), number).knobs != one.knobs


def test_the_first_episode_is_a_whole_run_with_the_usual_values(bench: Workbench) -> None:
    found = episodes(bench, steps=8, episode_steps=4, lr=0.03)
    episode = explored(found, 0)
    usual = {name: found.usual[name] for name in ("lr", "retain_weight", "coefficient")}
    assert all(knobs == pytest.approx(usual) for knobs in episode.knobs)
    assert list(episode.points) == [2, 4, 6, 8]
    other = explored(found, 1)
    assert list(other.points) == [2, 4] and other.knobs[0] != episode.knobs[0]
    assert [one.role for one in (episode, other)] == ["usual", "drawn"]
    # What it gained is counted as far as a short episode goes.
    gained, whole = (
        hypervolume(points, 0.5) + BELOW * hypervolume(points, 0.0)
        for points in ([episode.points[done] for done in (2, 4)], episode.points.values())
    )
    assert (episode.features, episode.places, episode.returns) == ((), (), (gained,))
    assert gained < whole


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_short_episode_is_the_beginning_of_a_run(bench: Workbench, schedule: str) -> None:
    """So that what it finds of a learning rate holds for the run."""
    found = episodes(bench, steps=8, episode_steps=4, lr_schedule=schedule)
    whole, _ = found.play(found.actor(0), 0)
    short, _ = found.play(found.actor(0), 1)
    assert list(short.points) == [2, 4]
    assert {done: whole.points[done] for done in (2, 4)} == short.points
    assert short.returns[0] == whole.returns[0] > 0
    assert [row[1] for row in short.features] == [0 - 0.5, 2 / 8 - 0.5]  # shares of the run


def test_the_first_episode_is_the_run_without_learning(bench: Workbench) -> None:
    """So what is chosen from holds what there would be without learning."""
    found = episodes(bench)
    _, result = found.play(found.actor(0), 0)
    mine = bench.learning.patch_of(bench.recipe, result.weights, {})
    plain, _ = bench.learning.train(bench.recipe.updated(tradeoff="fixed"))
    assert mine.deltas.keys() == plain.deltas.keys()
    for name, delta in plain.deltas.items():
        assert torch.allclose(mine.deltas[name], delta, rtol=1e-4, atol=1e-8), name


@pytest.mark.parametrize(
    ("given_steps", "steps", "expected"),
    [("auto", 40, 4), ("auto", 3, 3), (6, 40, 6), (7, 40, 8), (1, 40, 2), (7, 7, 7)],
    ids=["two actions", "whole", "given", "whole actions", "one", "no more than there are"],
)
def test_steps_of_an_episode(bench: Workbench, given_steps: Any, steps: int, expected: int) -> None:
    assert episodes(bench, episode_steps=given_steps, steps=steps).steps == expected


def test_an_episode_has_two_actions_where_the_run_has(bench: Workbench) -> None:
    short = {"episode_steps": "auto", "action_every": 10}
    assert episodes(bench, steps=40, **short).steps == 20
    assert episodes(bench, steps=15, **short).steps == 15


@pytest.mark.parametrize(("steps", "action"), [(80, 5), (150, 10), (3, 1)])
def test_actions_are_a_sixteenth_of_a_run(bench: Workbench, steps: int, action: int) -> None:
    usual = {"episode_steps": "auto", "action_every": "auto"}
    found = episodes(bench, steps=steps, **usual)
    assert (found.action_steps, found.steps) == (action, 2 * action)


# ---- one that diverges


@pytest.fixture
def absurd(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the place 50 the learning rate is beyond all bounds."""
    real = Scale.value

    def value(self: Scale, place: float) -> float:
        return ABSURD if self.knob.name == "lr" and place == 50.0 else real(self, place)

    monkeypatch.setattr(Scale, "value", value)


def absurd_from(action: int, found: Episodes) -> Any:
    """Usual knobs, and from an action on a rate beyond all bounds."""
    starts = found.policy.mean

    def actor(state: Any) -> Any:
        places = starts(state)
        if state.number >= action:
            places[0] = 50.0
        return places

    return actor


@pytest.mark.parametrize("reward", ["representation", "likelihood", "accuracy"])
def test_a_diverging_episode_counts_with_what_it_saw(
    files: dict[str, Path], reward: str, absurd: None
) -> None:
    asked = {key: str(files[f"{key}.jsonl"]) for key in ("questions", "retain_questions")}
    bench = Workbench(recipe(files, reward=reward, action_every=1, max_tokens=64, **asked))
    found = episodes(bench)
    usual, _ = found.play(found.policy.mean, 0)
    episode, _ = found.play(absurd_from(2, found), FIRST)
    assert episode.points[1] == usual.points[1] and episode.points[2] == usual.points[2]
    assert episode.steps < 6 and len(episode.returns) == len(episode.knobs) >= 3
    values = [value for point in episode.points.values() for value in point]
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in values)
    assert episode.reward >= hypervolume([usual.points[1], usual.points[2]], 0.5)
    assert episode.returns[2] == pytest.approx(0.0)  # what broke it brought nothing


def test_one_that_diverges_at_once_is_worth_nothing(bench: Workbench, absurd: None) -> None:
    found = episodes(bench)
    episode, result = found.play(absurd_from(0, found), 1)
    assert (episode.reward, episode.points, episode.returns) == (0.0, {}, (0.0,))
    assert (episode.steps, result.weights, result.log) == (0, {}, ())


def test_a_reward_that_the_objective_cannot_give_is_refused(files: dict[str, Path]) -> None:
    asked = recipe(files, objective="npo", layer="auto")
    with pytest.raises(RecipeError, match="reads no layer"):
        Workbench(asked).check(asked)


# ---- values and files

VALUES = st.floats(-5, 5)
ROWS = st.lists(st.lists(VALUES, min_size=2, max_size=2).map(tuple), max_size=3).map(tuple)
EPISODES = st.builds(
    Episode,
    number=st.integers(0, 99),
    role=st.sampled_from(get_args(Role)),
    steps=st.integers(0, 99),
    knobs=st.lists(st.fixed_dictionaries({"lr": VALUES, "beta": VALUES}), max_size=3).map(tuple),
    points=st.dictionaries(st.integers(1, 99), st.builds(Point, VALUES, VALUES), max_size=3),
    reward=VALUES,
    seconds=VALUES,
    features=ROWS,
    places=ROWS,
    returns=st.lists(VALUES, max_size=3).map(tuple),
)


@given(episode=EPISODES)
def test_an_episode_comes_back_from_json(episode: Episode) -> None:
    assert Episode.from_dict(episode.to_dict()) == episode
    back = Episode.from_dict(json.loads(json.dumps(episode.to_dict())))
    assert back == episode and all(isinstance(point, Point) for point in back.points.values())


def some(number: int, role: Role = "explored", place: float = 0.2, gain: float = 0.5) -> Episode:
    point, rows = Point(0.25, 0.75), (((1.0,),), ((place,),), (gain,))
    return Episode(number, role, 4, ({"lr": 0.1},), {4: point}, 0.5, 1.0, *rows)


def test_the_log_comes_back_as_it_was(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path / EPISODES_NAME, "here", "likelihood", RANGES)
    assert log.read() == []
    for written in ([some(0)], [some(0), some(1)], []):
        log.write(written)
        assert log.read() == written


def test_the_log_of_another_context_is_refused(tmp_path: Path) -> None:
    EpisodeLog(tmp_path / "log", "one", "likelihood", RANGES).write([some(0)])
    with pytest.raises(TrainingError, match="other data, another base") as caught:
        EpisodeLog(tmp_path / "log", "other", "likelihood", RANGES).read()
    assert "--fresh" in caught.value.fix and "episodes of one" in caught.value.got


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]\n", '{"context": "here"}\n{"number": 1}\n', '{"a": 1}\n', "1\n2\n"),
        '{"context": "here"}\n' + json.dumps(some(1).to_dict() | {"role": "other"}) + "\n",
    ],
)
def test_a_broken_log_is_no_log(tmp_path: Path, content: str) -> None:
    (tmp_path / "log").write_text(content)
    with pytest.raises(TrainingError, match="cannot be read"):
        EpisodeLog(tmp_path / "log", "here", "likelihood", RANGES).read()


# ---- many


def test_a_policy_learns_from_all_its_episodes_after_the_warm_up(bench: Workbench) -> None:
    found = episodes(bench)
    for number in range(FIRST):
        found.learn(explored(found, number))
    start = found.policy
    for number in range(FIRST, found.least - 1):
        found.learn(explored(found, number))
    assert found.policy is start
    found.learn(explored(found, found.least - 1))
    first = found.policy
    assert not np.array_equal(first.weights, start.weights)
    by_hand = start.updated([one.trajectory for one in found.played[FIRST:]])
    assert np.array_equal(first.weights, by_hand.weights)
    found.learn(explored(found, found.least))
    assert not np.array_equal(found.policy.weights, first.weights)


def test_drawn_episodes_hold_their_knobs_and_cover_the_ranges(bench: Workbench) -> None:
    found = episodes(bench)
    shares = []
    for number in range(1, FIRST):
        episode = explored(found, number)
        assert (episode.role, episode.log_density) == ("drawn", 0.0)
        assert all(place == episode.places[0] for place in episode.places)
        shares.append(1 / (1 + np.exp(-np.array(episode.places[0]))))
    assert np.ptp(shares, axis=0).min() > 0.2
    assert [explored(found, number).role for number in (0, FIRST)] == ["usual", "explored"]
    # Whatever the policy has become by then.
    found.acting = found.policy.starting([5.0] * len(found.scales))
    assert explored(found, 1).places[0] == pytest.approx(np.log(shares[0]) - np.log1p(-shares[0]))


@pytest.mark.parametrize(
    ("usual", "drawn", "expected"),
    [
        (0.3, [0.1, 0.5, 0.4], 1),  # the best of them
        (0.3, [0.1, 0.3, 0.2], None),  # none gained more than the usual values
        (0.3, [], None),
        (0.1, [0.1, 0.2, 0.2], 1),  # the first of equals
        (0.0, [0.0, 0.0], None),
    ],
)
def test_where_a_policy_begins(
    bench: Workbench, usual: float, drawn: list[float], expected: int | None
) -> None:
    found = episodes(bench)
    starts = [scale.start for scale in found.scales]
    for one in first_episodes(len(starts), usual, drawn):
        found.learn(one)
    begun = found.policy.starting(starts if expected is None else [float(expected)] * len(starts))
    assert found.policy.to_dict() == begun.to_dict()
    assert found.teaching == []


def first_episodes(n_knobs: int, usual: float, drawn: list[float]) -> list[Episode]:
    """Those before a policy plays, by gains; the i-th drawn has all knobs at the place i."""
    seen = [replace(some(0, "usual"), features=(), places=(), returns=(usual,))]
    for i, gain in enumerate(drawn):
        one = some(1 + i, "drawn", gain=gain)
        seen.append(replace(one, places=((float(i),) * n_knobs, (9.0,) * n_knobs)))
    return seen


@pytest.mark.parametrize("ended", ["collapsed", "diverged"])
def test_a_policy_does_not_begin_where_an_episode_ended_early(bench: Workbench, ended: Any) -> None:
    found = episodes(bench)
    usual, lost, kept = first_episodes(len(found.scales), 0.1, [0.5, 0.2])
    for one in (usual, replace(lost, ended=ended), kept):
        found.learn(one)
    assert found.policy.mean(State(0.0, START, 0)) == pytest.approx(1.0)


@pytest.mark.parametrize(("steps", "beats"), [(6, True), (7, False)])
def test_the_usual_run_counts_as_far_as_it_got(bench: Workbench, steps: int, beats: bool) -> None:
    """One that ended within a short episode's steps, of six, is no place to begin either."""
    found = episodes(bench)
    usual, drawn = first_episodes(len(found.scales), 0.5, [0.2])
    for one in (replace(usual, ended="collapsed", steps=steps), drawn):
        found.learn(one)
    assert (found.policy.mean(State(0.0, START, 0)) == 0.0).all() == beats


def test_another_run_s_policy_is_learned_again(bench: Workbench, tmp_path: Path) -> None:
    """From where it began, by every episode."""
    teacher = episodes(bench)
    named = ({scale.knob.name: 0.1 for scale in teacher.scales},)
    drawn = first_episodes(len(teacher.scales), 0.1, [0.0, 0.2, 0.5, 0.4, 0.3])
    first = [replace(one, knobs=named) for one in drawn]
    for one in first:
        teacher.learn(one)
    for number in range(FIRST, LEAST + 1):
        teacher.learn(explored(teacher, number))
    ranges = knob_ranges(bench.recipe)
    log = EpisodeLog(tmp_path / EPISODES_NAME, "here", "representation", ranges)
    log.write([*teacher.played, replace(some(LEAST + 1, "last"), knobs=named)])
    taught = episodes(bench, policy_from=str(tmp_path))
    assert taught.count == 0
    assert taught.policy.to_dict() == teacher.policy.to_dict()
    begun = teacher.policy.starting([2.0] * len(teacher.scales))
    assert not np.array_equal(taught.policy.weights, begun.weights)
    assert taught.policy.weights[:, 0] == pytest.approx(begun.weights[:, 0], abs=1.5)


def test_what_another_run_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that its policy rests on, in its order; not the run that followed."""
    log = EpisodeLog(tmp_path / EPISODES_NAME, "here", "likelihood", RANGES)
    of_no_use: list[list[Role]] = [[], ["usual"], ["usual", "last"], ["trial", "trial"]]
    for roles in of_no_use:
        log.write([some(number, role) for number, role in enumerate(roles)])
        with pytest.raises(RecipeError, match="no learned policy"):
            lessons(tmp_path, "likelihood", RANGES)
    taught = [some(0, "usual"), some(1, "drawn")]
    with monkeypatch.context() as patched:
        patched.setattr(episodes_module, "RULE", "an earlier one")
        log.write(taught)
    with pytest.raises(RecipeError, match="no learned policy") as told:
        lessons(tmp_path, "likelihood", RANGES)
    assert "another version" in told.value.got
    for seen in (taught, [*taught, some(2), some(3)]):
        log.write([*seen, some(len(seen), "last")])
        assert lessons(tmp_path, "likelihood", RANGES) == seen


def test_taken_in_again_episodes_give_the_same_archive(bench: Workbench, tmp_path: Path) -> None:
    def archive(folder: Path, found: Episodes) -> Archive:
        def make_patch(weights: Any, facts: Any) -> Patch:
            return found.learning.patch_of(found.recipe, weights, facts)

        found.archive = Archive(folder, 3, found.recipe.retain_floor, make_patch)
        return found.archive

    first, second = episodes(bench), episodes(bench)
    filled = archive(tmp_path / "one", first)
    played = [explored(first, number) for number in range(3)]
    again = archive(tmp_path / "two", second)
    for episode in played:
        second.take(episode)
    assert again.entries == filled.entries and filled.entries
    assert all(filled.path(entry).exists() for entry in filled.entries)
    assert not (tmp_path / "two").exists()
    assert second.note() == first.note() and "hypervolume" in first.note()


def test_an_exploration_goes_on_where_it_was_interrupted(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third episode, and again in the last run; front and patch are those of one piece."""
    own = bench.recipe.updated(episodes=4)

    def stage(name: str) -> Stage:
        (tmp_path / name).mkdir(exist_ok=True)
        return Stage(tmp_path / name / "state", tmp_path / name / "losses.jsonl", "here")

    whole, _ = bench.train(own, stage("whole"), tmp_path / "whole")
    real, calls = Episodes.play, []

    def play(self: Episodes, *args: Any, **settings: Any) -> Any:
        calls.append(args[1])
        found = real(self, *args, **settings)
        if len(calls) == 3:  # its patches are on disk, its line is not
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Episodes, "play", play)
        with pytest.raises(KeyboardInterrupt):
            bench.train(own, stage("parts"), tmp_path / "parts")
        path = tmp_path / "parts" / EPISODES_NAME
        assert len(EpisodeLog(path, "here", "likelihood", RANGES).read()) == 2

        def last(self: Episodes, *args: Any, **settings: Any) -> Any:
            if "on_step" in settings:
                steps: list[int] = []

                def on_step() -> None:
                    steps.append(1)
                    if len(steps) == 3:
                        raise KeyboardInterrupt

                settings["on_step"] = on_step
            return real(self, *args, **settings)

        patched.setattr(Episodes, "play", last)
        with pytest.raises(KeyboardInterrupt):
            bench.train(own, stage("parts"), tmp_path / "parts")
    parts, result = bench.train(own, stage("parts"), tmp_path / "parts")
    assert calls == [0, 1, 2]
    assert result is not None and len(result.log) == 6
    assert load_front(tmp_path / "parts") == load_front(tmp_path / "whole")
    assert parts.deltas.keys() == whole.deltas.keys()
    assert all(torch.equal(parts.deltas[name], whole.deltas[name]) for name in whole.deltas)
    names = [
        sorted(path.name for path in (tmp_path / name / "front").iterdir())
        for name in ("whole", "parts")
    ]
    assert names[0] == names[1] == sorted(e.file for e in load_front(tmp_path / "whole"))
    chosen = [
        {"point": number, **entry.to_dict()}
        for number, entry in enumerate(load_front(tmp_path / "whole"), 1)
        if entry.chosen
    ]
    assert chosen == [whole.metadata["training"]["tradeoff"]["chosen"]]
