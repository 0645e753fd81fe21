"""A patch: its algebra, the base it insists on, its file, and the LoRA adapter made from it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from expunge.errors import PatchError, ResourceError
from expunge.model.lora import to_peft
from expunge.model.patch import BaseTensor, Patch, causal_lm_name

DOWN = "model.layers.1.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def patch_of(model, *names: str, seed: int = 1, **metadata) -> Patch:
    """Random deltas for some parameters of a causal LM."""
    generator = torch.Generator().manual_seed(seed)
    before = {name: model.get_parameter(name).detach() for name in names}
    after = {
        name: value.float() + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in before.items()
    }
    base = {name: BaseTensor.of(value) for name, value in before.items()}
    return Patch.between(before, after, base, metadata)


def small(values: list[float], name: str = "a", metadata: dict | None = None) -> Patch:
    base = BaseTensor("f" * 64, torch.float32, (len(values),))
    return Patch({name: torch.tensor(values)}, {name: base}, metadata or {})


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- the value


def test_between_keeps_only_what_changed():
    before = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])}
    patch = Patch.between(before, {"a": torch.tensor([1.5, 0.0]), "b": torch.tensor([5.0])})
    assert patch.names == ("a",)
    assert len(patch) == 1
    assert patch.deltas["a"].tolist() == [0.5, -2.0]
    assert patch.base["a"] == BaseTensor.of(before["a"])


def test_between_refuses_different_names():
    with pytest.raises(PatchError, match="different names") as error:
        Patch.between({"a": torch.ones(1)}, {"b": torch.ones(1)})
    assert error.value.got == "a, b"


def test_hand_sums():
    a, b = small([1.0, -2.0], metadata={"x": 1}), small([0.5, 4.0], metadata={"x": 2})
    assert (a + b).deltas["a"].tolist() == [1.5, 2.0]
    assert (a - b).deltas["a"].tolist() == [0.5, -6.0]
    assert (0.5 * a).deltas["a"].tolist() == (a * 0.5).deltas["a"].tolist() == [0.5, -1.0]
    assert small([3.0, 4.0]).norm() == 5.0
    assert (small([3.0]) + small([4.0], "b")).norm() == 5.0
    assert Patch({}, {}).norm() == 0.0


def test_sum_is_the_union_and_tells_its_parts():
    a, b, c = (
        small([1.0], "a", {"objective": "probes"}),
        small([2.0], "b", {"objective": "cosine"}),
        small([3.0], "a", {"objective": "rmu"}),
    )
    total = a + (b - c) * 2
    assert total.names == ("a", "b")
    assert total.deltas["a"].tolist() == [-5.0]
    assert total.metadata == {
        "parts": [
            {"objective": "probes"},
            {"objective": "cosine", "scale": 2.0},
            {"objective": "rmu", "scale": -2.0},
        ]
    }


def test_sum_of_different_bases_is_refused():
    other = Patch({"a": torch.ones(1)}, {"a": BaseTensor("0" * 64, torch.float32, (1,))})
    with pytest.raises(PatchError, match="different bases cannot be added; they differ at a"):
        small([1.0]) + other


def test_construction_is_checked():
    base = {"a": BaseTensor("f" * 64, torch.float32, (2,))}
    with pytest.raises(PatchError, match="differ"):
        Patch({"b": torch.zeros(2)}, base)
    with pytest.raises(PatchError, match="a has another shape"):
        Patch({"a": torch.zeros(3)}, base)
    with pytest.raises(PatchError, match="not finite at a"):
        Patch({"a": torch.tensor([1.0, float("nan")])}, base)
    with pytest.raises(PatchError, match="no JSON form"):
        Patch({"a": torch.zeros(2)}, base, {"t": torch.zeros(1)})
    with pytest.raises(PatchError, match="no JSON form"):
        Patch({"a": torch.zeros(2)}, base, {"loss": float("nan")})
    with pytest.raises(TypeError):
        small([1.0]) + 3  # type: ignore[operator]


values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(values, values, values)
def test_algebra(x, y, z):
    a, b, c = small(x, metadata={"n": "a"}), small(y, metadata={"n": "b"}), small(z)
    left, right = (a + b) + c, a + (b + c)
    torch.testing.assert_close(left.deltas["a"], right.deltas["a"], rtol=1e-5, atol=1e-3)
    assert left.metadata == right.metadata
    assert torch.equal((a + b).deltas["a"], (b + a).deltas["a"])
    assert not (a + -a).deltas["a"].any()
    assert not (a - a).deltas["a"].any()
    assert (a * 2) * 0.5 == a
    assert -1 * -a == a
    assert a * 1 == a
    assert (a == b) == (x == y and a.metadata == b.metadata)


def test_patches_are_not_equal_to_other_things():
    assert small([1.0]) != 1
    assert small([1.0]) != small([1.0], "b")
    assert small([1.0]) != small([1.0], metadata={"x": 1})
    with pytest.raises(TypeError, match="unhashable"):
        hash(small([1.0]))


# ---- to a model in memory


def test_apply_changes_exactly_the_named_tensors():
    model = tiny_llama()
    before, patch = state(model), patch_of(model, DOWN, UP)
    patch.apply_(model, scale=0.5)
    for name, value in model.state_dict().items():
        expected = before[name] + 0.5 * patch.deltas[name] if name in patch.names else before[name]
        assert torch.equal(value, expected), name


def test_applying_twice_is_refused():
    model = tiny_llama()
    patch = patch_of(model, DOWN)
    patch.apply_(model)
    before = state(model)
    with pytest.raises(PatchError, match=f"{DOWN} differs from its base") as error:
        patch.apply_(model)
    assert patch.base[DOWN].fingerprint[:12] in error.value.allowed
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_applied_is_undone_bit_for_bit_also_after_an_error():
    model = tiny_llama()
    patch, before = patch_of(model, DOWN, UP), state(model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        base_logits = model(ids).logits
        with patch.applied(model) as patched:
            assert patched is model
            assert not torch.allclose(model(ids).logits, base_logits)
    with pytest.raises(KeyboardInterrupt), patch.applied(model):
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_without_head_takes_the_same_patch():
    model = tiny_llama()
    body = model.model
    assert causal_lm_name(body, "layers.1.mlp.down_proj.weight") == DOWN
    assert causal_lm_name(model, DOWN) == DOWN
    assert causal_lm_name(torch.nn.Linear(1, 1), "weight") == "weight"
    assert isinstance(body, LlamaModel)
    patch = patch_of(model, DOWN)
    expected = body.layers[1].mlp.down_proj.weight + patch.deltas[DOWN]
    patch.apply_(body)
    assert torch.equal(body.layers[1].mlp.down_proj.weight, expected)


def test_a_wider_dtype_is_fine_and_a_narrower_is_explained():
    model = tiny_llama().to(torch.bfloat16)
    patch = patch_of(model, DOWN)
    assert patch.base[DOWN].dtype == torch.bfloat16
    wide = copy.deepcopy(model).float()
    expected = wide.get_parameter(DOWN) + patch.deltas[DOWN]
    patch.apply_(wide)
    assert torch.equal(wide.get_parameter(DOWN), expected)
    with pytest.raises(PatchError, match="dtype that cannot hold") as error:
        patch.apply_(copy.deepcopy(model).half())
    assert error.value.got == "float16 in memory, bfloat16 on disk"
    assert "torch.bfloat16" in error.value.fix


def test_a_change_below_the_precision_on_disk_is_noticed():
    model = tiny_llama().to(torch.bfloat16)
    tiny = patch_of(model, DOWN) * 1e-6
    wide = model.float()
    tiny.apply_(wide)
    with pytest.raises(PatchError, match="differs from its base"):
        tiny.apply_(wide)


def test_a_model_that_is_not_the_base_is_refused():
    patch = patch_of(tiny_llama(), DOWN)
    with pytest.raises(PatchError, match="differs from its base"):
        patch.apply_(tiny_llama(seed=5))
    with pytest.raises(PatchError, match=f"no parameter {DOWN}"):
        patch.apply_(tiny_gpt2())
    other = tiny_llama()
    other.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(32, 40))
    with pytest.raises(PatchError, match="another shape") as error:
        patch.apply_(other)
    assert (error.value.got, error.value.allowed) == ("[32, 40]", "[32, 48]")


def test_overflow_is_refused_before_anything_changes():
    model = tiny_llama().half()
    patch, before = patch_of(model, UP, DOWN), state(model)
    with pytest.raises(PatchError, match="is not finite") as error, patch.applied(model, 1e9):
        pass
    assert "65504" in error.value.allowed
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_tied_weights_under_two_names_are_refused():
    model = tiny_gpt2()
    names = ("transformer.wte.weight", "lm_head.weight")
    assert patch_of(model, names[0]).apply_(copy.deepcopy(model)) is None
    with pytest.raises(PatchError, match="under two names"):
        patch_of(model, *names).apply_(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    model = tiny_llama()
    patch = patch_of(model, DOWN)
    expected = model.get_parameter(DOWN) + patch.deltas[DOWN]
    model.cuda()
    before = state(model)
    with patch.applied(model):
        assert torch.equal(model.get_parameter(DOWN).cpu(), expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(PatchError), patch.applied(model), patch.applied(model):
        pass


# ---- to a file


def test_file_round_trip(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    patch = patch_of(model, DOWN, UP, objective="probes", layers=(1, 2), name="Zürich")
    path = patch.save(tmp_path / "deep" / "patch.safetensors")
    assert Patch.load(path) == patch
    assert patch.metadata["layers"] == [1, 2]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    raw = load_file(path)
    assert torch.equal(raw[DOWN], patch.deltas[DOWN])
    assert (patch + patch) == Patch.load((patch + patch).save(path))


def test_views_of_one_storage_can_be_saved(tmp_path):
    flat = torch.arange(6.0)
    base = {name: BaseTensor("f" * 64, torch.float32, (3,)) for name in "ab"}
    patch = Patch({"a": flat[:3], "b": flat[3:]}, base)
    assert Patch.load(patch.save(tmp_path / "p.safetensors")) == patch


def rewritten(path, **changes):
    """The same file with other entries in its metadata header."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    save_file(load_file(path), path, metadata={**metadata, **changes})
    return path


def test_unreadable_files(tmp_path):
    patch = small([1.0, 2.0])
    path = patch.save(tmp_path / "p.safetensors")
    whole = path.read_bytes()

    for cut in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(PatchError, match="no readable patch") as error:
            Patch.load(path)
        assert "truncated" in error.value.got, cut
    path.write_bytes(whole[:8] + b"!" + whole[9:])
    with pytest.raises(PatchError, match="header is damaged"):
        Patch.load(path)
    with pytest.raises(PatchError, match="No such file"):
        Patch.load(tmp_path / "absent.safetensors")
    with pytest.raises(PatchError, match="no readable patch"):
        Patch.load(tmp_path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(PatchError, match="not written by expunge"):
        Patch.load(path)

    for key, value in {
        "base": "{}",
        "metadata": "not JSON",
    }.items():
        with pytest.raises(PatchError):
            Patch.load(rewritten(patch.save(path), **{key: value}))
    bad_dtype = json.dumps({"a": {**patch.base["a"].to_dict(), "dtype": "int8"}})
    with pytest.raises(PatchError, match="damaged metadata"):
        Patch.load(rewritten(patch.save(path), base=bad_dtype))
    with pytest.raises(PatchError, match="does not know") as error:
        Patch.load(rewritten(patch.save(path), version="2"))
    assert (error.value.got, error.value.allowed) == ("format version 2", "format version 1")


def test_non_finite_deltas_in_a_file(tmp_path):
    path = small([1.0, 2.0]).save(tmp_path / "p.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\x00\x00\x80\x7f")  # +inf
    with pytest.raises(PatchError, match="not finite at a") as error:
        Patch.load(path)
    assert error.value.got.startswith("1 values")


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from expunge.model import shards

    path = small([1.0]).save(tmp_path / "p.safetensors")

    def full(*_args, **_kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(ResourceError, match="disk is full"):
        small([2.0]).save(path)
    assert Patch.load(path) == small([1.0])
    assert len(list(tmp_path.iterdir())) == 1


# ---- to a LoRA adapter


def test_low_rank_errors_by_hand(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    base = {name: BaseTensor("f" * 64, torch.float32, (2, 3))}
    patch = Patch({name: torch.tensor([[4.0, 0, 0], [0, 3.0, 0]])}, base)
    export = to_peft(patch, tmp_path, rank=1, base_model="owner/name")
    assert export.errors[name] == pytest.approx(3 / 5)
    assert export.total_error == pytest.approx(3 / 5)
    assert to_peft(patch, tmp_path, rank=9, base_model="owner/name").total_error < 1e-6
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    assert to_peft(patch * 0.0, tmp_path, rank=1, base_model="owner/name").total_error == 0.0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [4, 32])
def test_peft_loads_the_adapter(tmp_path, kind, rank):
    peft = pytest.importorskip("peft")
    if kind == "llama":
        model, names = tiny_llama(), (DOWN, UP, "lm_head.weight")
    else:
        # attn.c_proj is square: a wrong orientation would not be noticed by its shape.
        model = tiny_gpt2()
        names = ("transformer.h.1.mlp.c_proj.weight", "transformer.h.0.attn.c_proj.weight")
    model.save_pretrained(tmp_path / "base")
    patch = patch_of(model, *names)
    export = to_peft(patch, tmp_path / "lora", rank=rank, base_model=tmp_path / "base")
    ids = torch.arange(10)[None]
    with torch.no_grad(), patch.applied(model):
        expected_logits = model(ids).logits

    before = state(model)
    adapted = peft.PeftModel.from_pretrained(model, export.path).eval()
    with torch.no_grad():
        logits = adapted(ids).logits
    merged = adapted.merge_and_unload().state_dict()
    for name in names:
        u, s, vh = torch.linalg.svd(patch.deltas[name], full_matrices=False)
        truncated = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(merged[name] - before[name], truncated, rtol=0, atol=1e-5)
        tail = float(s[rank:].norm() / s.norm())
        assert export.errors[name] == pytest.approx(tail, abs=1e-5)
    if rank == 32:
        assert export.total_error < 1e-5
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    else:
        assert export.total_error > 0.3
        assert not torch.allclose(logits, expected_logits, atol=1e-4)


def test_what_lora_cannot_hold_is_refused(tmp_path):
    model = tiny_llama()
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        with pytest.raises(PatchError, match="linear layers only") as error:
            to_peft(patch_of(model, name), tmp_path, rank=2, base_model="owner/name")
        assert error.value.got == name
    with pytest.raises(PatchError, match="rank of at least 1"):
        to_peft(patch_of(model, DOWN), tmp_path, rank=0, base_model="owner/name")
    gpt2 = patch_of(tiny_gpt2(), "transformer.h.1.mlp.c_proj.weight")
    with pytest.raises(PatchError, match="not clear whether the layers are Conv1D"):
        to_peft(gpt2, tmp_path, rank=2, base_model="openai-community/gpt2")
    assert to_peft(gpt2, tmp_path, rank=2, base_model="x/y", fan_in_fan_out=True).errors
