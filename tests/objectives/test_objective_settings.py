"""Settings of objectives, their registry, targets and noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expunge.errors import RecipeError
from expunge.objectives import OBJECTIVES, Activations, Captured, Knob, Logprobs, Loss, objective
from expunge.objectives.retain import add_noise, safe_norm
from expunge.objectives.targets import Targets
from expunge.registry import Entry, Registry, settings_of

# ---- settings


def test_defaults_are_filled_in() -> None:
    assert settings_of(OBJECTIVES.get("adaptive-rmu"), {"beta": 3.0}) == {
        "beta": 3.0,
        "scale": "per-sample",
    }
    assert settings_of(OBJECTIVES.get("rerouting"), {}) == {}


def test_an_unknown_key_meets_its_nearest_name() -> None:
    with pytest.raises(RecipeError) as caught:
        settings_of(OBJECTIVES.get("rmu"), {"coeficient": 3})
    assert caught.value.got == "'coeficient'"
    assert caught.value.allowed == "coefficient"
    assert "did you mean 'coefficient'" in caught.value.fix
    with pytest.raises(RecipeError, match="no settings"):
        settings_of(OBJECTIVES.get("rerouting"), {"anything": 1})


@pytest.mark.parametrize("entry", list(OBJECTIVES), ids=lambda entry: entry.name)
def test_knobs_are_settings_whose_default_lies_in_their_range(entry: Entry[Any]) -> None:
    defaults = settings_of(entry, {}) | {"retain_weight": entry.extras["retain_weight"]}
    for knob in entry.extras["knobs"]:
        usual = defaults[knob.name]
        assert isinstance(usual, float)
        low, high = (x * usual if knob.relative else x for x in (knob.low, knob.high))
        assert low < high and low <= usual <= high
        assert knob.scale == "linear" or low > 0


def _toy(forget: Captured, retain: Captured, *, n: int = 1, x: float = 1.0, on: bool = False,
         word: str = "a") -> Loss:  # fmt: skip
    raise NotImplementedError


TOY = Entry("toy", _toy, "here", "none", {}, "objective")


@pytest.mark.parametrize(
    "given",
    [{"n": True}, {"n": 0.5}, {"n": "1"}, {"x": "1"}, {"x": False}, {"on": 1}, {"on": "yes"},
     {"word": 3}, {"word": True}, {"word": None}],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="wrong kind") as caught:
        settings_of(TOY, given)
    assert next(iter(given)) in caught.value.what


@pytest.mark.parametrize(
    "given", [{"n": 3}, {"x": 2}, {"x": 2.5}, {"on": True}, {"word": "b"}, {"n": 0, "on": False}]
)
def test_a_value_of_the_right_kind_is_taken(given: dict[str, Any]) -> None:
    assert settings_of(TOY, given) == {"n": 1, "x": 1.0, "on": False, "word": "a", **given}


# ---- registry


def test_an_unknown_objective_meets_its_nearest_name() -> None:
    with pytest.raises(RecipeError) as caught:
        OBJECTIVES.get("cosine-rmuu")
    assert "did you mean 'cosine-rmu'" in caught.value.fix
    assert caught.value.allowed == ", ".join(OBJECTIVES.names())


def test_a_name_registers_once() -> None:
    registry: Registry[Any] = Registry("toy")
    registry.register("one", source="here", deviations="none", weight=3)(_toy)
    assert registry.names() == ["one"]
    assert registry.get("one") == Entry("one", _toy, "here", "none", {"weight": 3}, "toy")
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("one", source="here", deviations="none")(_toy)


@pytest.mark.parametrize(("source", "deviations"), [("", "none"), ("  ", "none"), ("here", "")])
def test_source_and_deviations_are_mandatory(source: str, deviations: str) -> None:
    with pytest.raises(ValueError, match="needs a source"):
        Registry("toy").register("one", source=source, deviations=deviations)


def test_a_registered_objective_is_still_the_function() -> None:
    from expunge.objectives.misdirection import rmu

    entry = OBJECTIVES.get("rmu")
    assert entry.part is rmu
    assert entry.extras["needs"] == Activations()
    assert entry.extras["retain_weight"] == 1200.0


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_objective_fills_in_and_checks_its_own_settings(name: str) -> None:
    entry = OBJECTIVES.get(name)
    defaults = settings_of(entry, {})
    assert settings_of(entry, defaults) == defaults
    for key in defaults:
        with pytest.raises(RecipeError, match=f"Setting {key} of objective {name}"):
            settings_of(entry, {key: None})
    with pytest.raises(RecipeError, match=f"Objective {name} has no setting"):
        settings_of(entry, {"no-such": 1})


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("npo", Logprobs()),
        ("dpo", Logprobs(twin=True)),
        ("graddiff", Logprobs(forget_reference=False)),
        ("simnpo", Logprobs(forget_reference=False)),
        ("multi-layer-probe", Activations(True, probes="many", twin_logprobs=True)),
        ("single-layer-probe", Activations(True, probes="one", twin_logprobs=True)),
        ("cosine-rmu", Activations(reference_settings=("norm_weight",))),
    ],
)
def test_what_objectives_need(name: str, needs: Any) -> None:
    assert OBJECTIVES.get(name).extras["needs"] == needs


def test_a_setting_may_need_the_originals_of_forget_texts() -> None:
    needs = OBJECTIVES.get("cosine-rmu").extras["needs"]
    assert not needs.given({"norm_weight": 0.0}).forget_reference
    assert needs.given({"norm_weight": 0.1}).forget_reference
    for other in (Activations(), Activations(True), Logprobs(), Logprobs(twin=True)):
        assert other.given({}) == other


@pytest.mark.parametrize("setting", ["no-such", "weight", "_forget"])
def test_what_asks_for_originals_is_a_setting_and_no_knob(setting: str) -> None:
    """What a trade-off may move while a run goes on cannot ask for more boundaries."""
    add = objective(
        "asking",
        source="here",
        deviations="none",
        needs=Activations(reference_settings=(setting,)),
        retain_weight=1.0,
        knobs=(Knob("weight", 0.1, 1.0),),
    )

    def asking(_forget: Captured, _retain: Captured, *, weight: float = 0.5) -> Loss:
        raise AssertionError(weight)

    with pytest.raises(ValueError, match=setting):
        add(asking)
    assert "asking" not in OBJECTIVES


def test_a_knob_is_a_setting() -> None:
    add = objective(
        "misspelt",
        source="here",
        deviations="none",
        needs=Activations(),
        retain_weight=1.0,
        knobs=(Knob("retain_weight", 0.5, 2.0), Knob("margni", 0.1, 1.0)),
    )

    def misspelt(_forget: Captured, _retain: Captured, *, margin: float = 0.5) -> Loss:
        raise AssertionError(margin)

    with pytest.raises(ValueError, match=r"no settings: \['margni'\]"):
        add(misspelt)
    assert "misspelt" not in OBJECTIVES


def test_log_probabilities_come_with_the_originals_and_no_layers() -> None:
    assert Logprobs().forget_reference and Logprobs().probes == "none"
    assert not Logprobs().twin and not Activations().twin_logprobs


@pytest.mark.parametrize("name", ["npo", "dpo", "simnpo"])
@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_is_positive(name: str, beta: float) -> None:
    nothing = Captured({}, {}, torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(RecipeError, match="beta"):
        OBJECTIVES.get(name).part(nothing, nothing, beta=beta)


# ---- targets

IDS_BT = torch.tensor([[5, 9, 5], [9, 1, 0]])


def test_positive_targets_lie_in_the_positive_orthant() -> None:
    for topic in range(5):
        u_D = Targets("positive", 3, 64).at(topic, IDS_BT)
        assert u_D.shape == (64,) and bool((u_D >= 0).all())
        assert float(u_D.norm()) == pytest.approx(1, abs=1e-6)


def test_centered_targets_lie_anywhere() -> None:
    u_D = Targets("centered", 3, 512).at(0, IDS_BT)
    assert float(u_D.norm()) == pytest.approx(1, abs=1e-6)
    assert 0.4 < float((u_D > 0).float().mean()) < 0.6
    assert abs(float(u_D.mean())) < 0.01


@pytest.mark.parametrize("kind", ["positive", "centered"])
def test_seed_and_topic_decide(kind: Any) -> None:
    u_D = Targets(kind, 3, 64).at(0, IDS_BT)
    assert torch.equal(u_D, Targets(kind, 3, 64).at(0, torch.zeros(1, 1, dtype=torch.long)))
    others = [Targets(kind, 3, 64).at(1, IDS_BT), Targets(kind, 4, 64).at(0, IDS_BT)]
    assert not any(torch.allclose(u_D, other) for other in others)


def test_the_global_generator_has_no_say() -> None:
    torch.manual_seed(1)
    first = Targets("positive", 0, 16).at(0, IDS_BT)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, Targets("positive", 0, 16).at(0, IDS_BT))
    assert torch.equal(state, torch.get_rng_state())


def test_one_target_for_each_token_id() -> None:
    u_BTD = Targets("per-token", 3, 16).at(0, IDS_BT)
    assert u_BTD.shape == (2, 3, 16)
    assert torch.allclose(u_BTD.norm(dim=-1), torch.ones(2, 3))
    assert torch.equal(u_BTD[0, 0], u_BTD[0, 2])  # id 5
    assert torch.equal(u_BTD[0, 1], u_BTD[1, 0])  # id 9
    assert not torch.allclose(u_BTD[0, 0], u_BTD[0, 1])
    # In another batch and topic the same id keeps its vector; with another seed it does not.
    alone = torch.tensor([[9]])
    assert torch.equal(Targets("per-token", 3, 16).at(1, alone)[0, 0], u_BTD[0, 1])
    assert not torch.allclose(Targets("per-token", 4, 16).at(0, alone)[0, 0], u_BTD[0, 1])


# ---- noise and norms


def test_noise_has_the_standard_deviation_asked_for() -> None:
    reference = {1: torch.full((20, 50, 30), 2.0), 2: torch.zeros(20, 50, 30)}
    noisy = add_noise(reference, std=0.3, generator=torch.Generator().manual_seed(0))
    for layer, acts in noisy.items():
        delta = acts - reference[layer]
        assert float(delta.std()) == pytest.approx(0.3, rel=0.02)
        assert abs(float(delta.mean())) < 0.01
    assert not torch.allclose(noisy[1] - 2.0, noisy[2], atol=0.1)
    assert bool((reference[1] == 2.0).all())


def test_noise_is_drawn_from_the_generator() -> None:
    reference = {0: torch.zeros(2, 3, 4)}

    def draw(seed: int) -> torch.Tensor:
        return add_noise(reference, std=1.0, generator=torch.Generator().manual_seed(seed))[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_no_noise_is_no_change() -> None:
    reference = {0: torch.randn(2, 3, 4)}
    assert add_noise(reference, std=0, generator=torch.Generator())[0] is reference[0]


def test_noise_keeps_a_narrow_dtype() -> None:
    reference = {0: torch.zeros(2, 3, 4, dtype=torch.bfloat16)}
    noisy = add_noise(reference, std=0.1, generator=torch.Generator().manual_seed(0))[0]
    assert noisy.dtype == torch.bfloat16


def test_the_norm_of_zero_has_a_gradient() -> None:
    x_BTD = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]], requires_grad=True)
    norms_BT = safe_norm(x_BTD)
    assert norms_BT[0].tolist() == pytest.approx([1e-6, 5.0])
    norms_BT.sum().backward()
    assert x_BTD.grad is not None
    assert x_BTD.grad[0].flatten().tolist() == pytest.approx([0, 0, 0.6, 0.8])
