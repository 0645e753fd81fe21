"""Model directories: read without loading, opened truncated, patched by copying."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from expunge.errors import ModelError, PatchError, ResourceError
from expunge.model import apply as module
from expunge.model.apply import apply_patch
from expunge.model.checkpoint import Checkpoint, open_model
from expunge.model.patch import Patch, causal_lm_name
from expunge.model.shards import fingerprint

LAYERS = 4
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 64, "bos_token_id": 1}
GEMMA3N = {
    "sliding_window": 4,
    "config": "Gemma3nTextConfig",
    "num_hidden_layers": 10,
    "num_kv_shared_layers": 3,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 10,
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 4},
    "Gemma3": {"sliding_window": 4, "config": "Gemma3TextConfig"},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 4},
    "Phi3": {},
    "GPTNeoX": {},
    "GPT2": GPT2,
}
DOWN = "model.layers.1.mlp.down_proj.weight"
IDS = torch.arange(3, 15)[None]


def tiny_model(family: str = "Llama", **settings):
    torch.manual_seed(0)
    own = FAMILIES.get(family, {}) | settings
    config = getattr(transformers, own.pop("config", family + "Config"))
    common = {"eos_token_id": 2} if family == "GPT2" else COMMON
    head = "GPT2LMHeadModel" if family == "GPT2" else family + "ForCausalLM"
    return getattr(transformers, head)(config(**common | own)).eval()


def save_tokenizer(directory: Path) -> None:
    vocabulary = {word: at for at, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(
        directory
    )


def saved(directory: Path, family: str = "Llama", *, dtype=torch.float32, shard="50GB", **settings):
    """A model directory with a tokenizer; returns the model as saved."""
    model = tiny_model(family, **settings).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    save_tokenizer(directory)
    return model


def made_patch(directory: Path, *names: str, size: float = 0.05) -> Patch:
    """A random patch for the named parameters of a stored causal LM."""
    generator = torch.Generator().manual_seed(1)
    checkpoint = Checkpoint.open(directory)
    base = checkpoint.base_tensors(names)
    deltas = {
        name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()
    }
    return Patch(deltas, base, {"objective": "probes"})


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.rglob("*")
        if file.is_file()
    }


# ---- reading


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_tensor_table(tmp_path, shard):
    model = saved(tmp_path, dtype=torch.bfloat16, shard=shard)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.tensors.keys() == model.state_dict().keys()
    assert (len({info.file for info in checkpoint.tensors.values()}) > 1) == (shard == "20KB")
    for name, value in model.state_dict().items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape) == (torch.bfloat16, tuple(value.shape))
        assert torch.equal(info.read(), value)
        assert checkpoint.tensors[name].fingerprint() == fingerprint(value, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_fingerprint_of_a_model_read_wider_is_that_of_the_file(tmp_path, dtype):
    save_file({"model.w": torch.randn(3, 5).to(dtype)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = Checkpoint.open(tmp_path)
    wide = checkpoint.tensors["model.w"].read().double()
    assert checkpoint.tensors["model.w"].fingerprint() == fingerprint(wide, dtype)
    assert checkpoint.tensors["model.w"].fingerprint() != fingerprint(wide + 1, dtype)
    assert checkpoint.tensors["model.w"].fingerprint() != fingerprint(wide.T, dtype)


def test_fingerprint_by_hand():
    tensor = torch.tensor([1.0, -2.0])
    raw = b"float16 [2]\n" + bytes.fromhex("003c00c0")
    assert fingerprint(tensor, torch.float16) == hashlib.sha256(raw).hexdigest()
    assert fingerprint(torch.tensor(1.0), torch.float32) != fingerprint(tensor[:1], torch.float32)
    empty = hashlib.sha256(b"float32 [0]\n").hexdigest()
    assert fingerprint(torch.empty(0), torch.float32) == empty


def directory_with(tmp_path: Path, *names: str) -> Checkpoint:
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return Checkpoint.open(tmp_path)


def test_resolve(tmp_path):
    checkpoint = directory_with(
        tmp_path, "h.0.mlp.w", "h.1.mlp.w", "x.model.layers.0.w", "wte.w", "norm.w", "h.0.norm.w"
    )
    assert checkpoint.resolve("h.0.mlp.w") == "h.0.mlp.w"
    assert checkpoint.resolve("transformer.h.0.mlp.w") == "h.0.mlp.w"
    assert checkpoint.resolve("model.layers.0.w") == "x.model.layers.0.w"
    assert checkpoint.resolve("layers.0.w") == "x.model.layers.0.w"
    assert checkpoint.resolve("transformer.wte.w") == "wte.w"
    assert checkpoint.resolve("model.norm.w") == "norm.w"
    # Another layer, another module, or only the last word in common is no match.
    for name in ("transformer.h.2.mlp.w", "h.1.norm.w", "lm_head.w", "w", "mlp.w"):
        with pytest.raises(ModelError, match="does not store") as error:
            checkpoint.resolve(name)
        assert name in error.value.what


def test_resolve_refuses_two_answers(tmp_path):
    checkpoint = directory_with(tmp_path, "text.layers.0.w", "vision.layers.0.w")
    with pytest.raises(ModelError, match="under one name") as error:
        checkpoint.resolve("model.layers.0.w")
    assert error.value.got == "text.layers.0.w, vision.layers.0.w"


def test_directories_that_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="There is no model at") as error:
        Checkpoint.open(tmp_path / "absent")
    assert error.value.got == "no such directory"

    saved(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, settings = weights.read_bytes(), config.read_text()

    for content, match in ((whole[:-1], "truncated"), (whole[:5], "too short"), (b"", "too short")):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match=match) as error:
            Checkpoint.open(tmp_path)
        assert "no whole safetensors file" in error.value.what
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="LFS"):
        Checkpoint.open(tmp_path)
    weights.write_bytes(whole[:8] + whole[8:].replace(b'"F32"', b'"F99"'))
    with pytest.raises(ModelError, match="dtype F99"):
        Checkpoint.open(tmp_path)
    weights.write_bytes(whole.replace(b'"shape":[32]', b'"shape":[31]'))
    with pytest.raises(ModelError, match="header is damaged"):
        Checkpoint.open(tmp_path)

    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickle") as error:
        Checkpoint.open(tmp_path)
    assert error.value.got == "pytorch_model.bin"
    assert "convert" in error.value.fix
    weights.write_bytes(whole)

    for other in ('{"model_type": "vit"}', '{"architectures": ["LlamaForSequenceClassification"]}'):
        config.write_text(json.dumps(json.loads(settings) | json.loads(other)))
        with pytest.raises(ModelError, match="no causal language model"):
            Checkpoint.open(tmp_path)
    config.write_text("{")
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        Checkpoint.open(tmp_path)
    config.unlink()
    with pytest.raises(ModelError, match=r"config.json cannot be read") as error:
        Checkpoint.open(tmp_path)
    assert "FileNotFoundError" in error.value.got


def test_broken_indexes(tmp_path):
    saved(tmp_path, shard="20KB")
    index = tmp_path / module.INDEX
    raw = json.loads(index.read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))

    shards[1].rename(tmp_path / "aside")
    with pytest.raises(ModelError, match="names shards that are not there") as error:
        Checkpoint.open(tmp_path)
    assert error.value.got == shards[1].name
    (tmp_path / "aside").rename(shards[1])

    for weight_map, match in (
        ({}, "no shard at all"),
        ({"w": "../other.safetensors"}, r"\.\./other"),
        (raw["weight_map"] | {"ghost.weight": shards[0].name}, r"ghost\.weight is not in"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=match):
            Checkpoint.open(tmp_path)


def test_hub_names(tmp_path, monkeypatch):
    asked = {}

    def download(name, **settings):
        asked.update(name=name, **settings)
        if name.startswith("no"):
            raise OSError("not found\nlong story")
        saved(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Checkpoint.open("owner/name").directory == tmp_path
    assert asked["name"] == "owner/name"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])
    with pytest.raises(ModelError, match="from the Hub OSError: not found") as error:
        Checkpoint.open("no/name")
    assert "long story" not in str(error.value)
    asked.clear()
    for local in ("./owner/name", "name", "/owner/name", "a/b/c"):
        with pytest.raises(ModelError, match="no such directory"):
            Checkpoint.open(local)
    assert not asked


# ---- loading


@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_hidden_states_equal_the_whole_model(tmp_path, family, caplog, capfd):
    saved(tmp_path, family)
    if family == "GPT2":  # the names of old GPT-2 files
        path = tmp_path / "model.safetensors"
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    capfd.readouterr()
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        whole, tokenizer = open_model(tmp_path, layers=None, dtype=torch.float32, device="cpu")
        total = whole.config.num_hidden_layers
        depths = [1, total - 1, total]
        cut = {
            n: open_model(tmp_path, layers=n, dtype=torch.float32, device="cpu")[0] for n in depths
        }
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert tokenizer("a b")["input_ids"] == [4, 5]
    assert not whole.training

    outputs = {}
    checkpoint = Checkpoint.open(tmp_path)
    names = dict(whole.named_parameters())
    layers = layer_list(whole)
    for at, layer in enumerate(layers):
        layer.register_forward_hook(lambda _m, _i, out, at=at: outputs.update({at + 1: first(out)}))
    with torch.no_grad():
        whole(IDS)
    for n, model in cut.items():
        assert not any("lm_head" in name for name, _ in model.named_parameters())
        assert len(layer_list(model)) == model.config.num_hidden_layers == n
        kept = []
        layer_list(model)[-1].register_forward_hook(
            lambda _m, _i, out, kept=kept: kept.append(first(out))
        )
        with torch.no_grad():
            model(IDS)
        assert torch.equal(kept[0], outputs[n]), n
        for name, value in model.named_parameters():
            full = causal_lm_name(model, name)
            assert torch.equal(value, names[full]), full
            on_disk = checkpoint.tensors[checkpoint.resolve(full)].fingerprint()
            assert on_disk == fingerprint(value, torch.float32)


def test_layers_that_depend_on_later_ones_are_not_cut(tmp_path):
    saved(tmp_path, "Gemma3n", **GEMMA3N)
    with pytest.raises(ModelError, match="cannot be opened truncated") as error:
        open_model(tmp_path, layers=9, dtype=torch.float32, device="cpu")
    assert "gemma3n_text" in error.value.got
    assert open_model(tmp_path, layers=10, dtype=torch.float32, device="cpu")


def layer_list(model):
    """The decoder layers of any of the families."""
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


MEMORY = """
import resource, sys, torch
from pathlib import Path
from expunge.model.checkpoint import open_model
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
open_model(sys.argv[1], layers=1, dtype=torch.float32, device="cpu")
before = peak()
open_model(sys.argv[2], layers=2, dtype=getattr(torch, sys.argv[3]), device="cpu")
print(peak() - before)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """A model of some 200 MB in bfloat16, 16 layers, all weights one."""
    directory = tmp_path_factory.mktemp("big")
    settings = COMMON | {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 16}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    weights = {
        name: torch.ones(value.shape, dtype=torch.bfloat16)
        for name, value in model.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in kilobytes")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_follows_the_layers_that_are_read(tmp_path, big, dtype):
    saved(tmp_path)
    size = (big / "model.safetensors").stat().st_size
    assert size > 200e6
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, big, dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    # The mapped pages of the file count too, beside the float32 copy.
    part = size * 2 / 16
    assert int(done.stdout) < part * (3 if dtype == "float32" else 1) + 15e6


@pytest.mark.parametrize("layers", [0, 5, -1])
def test_layers_the_model_does_not_have(tmp_path, layers):
    saved(tmp_path)
    with pytest.raises(ModelError, match="no such layers") as error:
        open_model(tmp_path, layers=layers, dtype=torch.float32, device="cpu")
    assert error.value.allowed == "1 to 4"


def test_models_that_cannot_be_loaded_whole(tmp_path):
    def load(layers=None):
        return open_model(tmp_path, layers=layers, dtype=torch.float32, device="cpu")

    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != DOWN}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights, .* for model\.layers\.1\.mlp\.down_proj"):
        load()
    with pytest.raises(ModelError, match=r"no weights, .* for layers\.1\.mlp\.down_proj"):
        load(layers=2)
    assert load(layers=1)
    save_file(tensors | {DOWN: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model of .* cannot be loaded") as error:
        load()
    assert DOWN in error.value.got
    save_file(tensors, path, metadata={"format": "pt"})
    assert load()
    for broken in ("{", '{"version": "1.0"}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ModelError, match=r"tokenizer of .* cannot be loaded"):
            load()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be loaded"):
        load()


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Qwen2"])
def test_missing_tokenizers(tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be loaded"):
        open_model(tmp_path, layers=None, dtype=torch.float32, device="cpu")


def test_out_of_memory_is_told(tmp_path, monkeypatch):
    saved(tmp_path)

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ResourceError, match="does not fit into memory"):
        open_model(tmp_path, layers=None, dtype=torch.float32, device="cpu")


def test_verbosity_is_restored(tmp_path):
    saved(tmp_path)
    from transformers.utils import logging as library

    before = library.get_verbosity(), library.is_progress_bar_enabled()
    with pytest.raises(ModelError):
        open_model(tmp_path, layers=9, dtype=torch.float32, device="cpu")
    assert (library.get_verbosity(), library.is_progress_bar_enabled()) == before


# ---- applying


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_equals_the_patch_in_memory(tmp_path, dtype, shard):
    base, out = tmp_path / "base", tmp_path / "new" / "out"
    saved(base, dtype=dtype, shard=shard)
    names = (DOWN, "model.layers.2.mlp.up_proj.weight", "model.norm.weight")
    patch, before = made_patch(base, *names), hashes(base)
    steps = []
    assert apply_patch(patch, base, out, scale=0.5, on_progress=lambda *s: steps.append(s)) == out
    assert hashes(base) == before
    assert steps[-1][0] == steps[-1][1] > 0

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    patch.apply_(model, scale=0.5)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    told = json.loads((out / "expunge.json").read_text())
    assert (told["scale"], told["metadata"]) == (0.5, {"objective": "probes"})
    assert told["changed"][DOWN]["fingerprint"] == patch.base[DOWN].fingerprint
    assert not list(out.parent.glob(".*"))

    # Outside the changed tensors, every byte is the base's.
    old, new = Checkpoint.open(base), Checkpoint.open(out)
    for shard_file in {info.file for info in old.tensors.values()}:
        a, b = bytearray(shard_file.read_bytes()), bytearray((out / shard_file.name).read_bytes())
        for name in names:
            info = new.tensors[name]
            if info.file.name == shard_file.name:
                a[info.start : info.end] = b[info.start : info.end] = b""
                a[info.start : info.start] = b[info.start : info.start] = bytes(
                    info.end - info.start
                )
        assert a == b
    unchanged = set(before) - {info.file.name for info in old.tensors.values()}
    assert {name: hashes(out)[name] for name in unchanged} == {n: before[n] for n in unchanged}


def test_scale_zero_gives_the_base_and_minus_one_undoes(tmp_path):
    base = tmp_path / "base"
    saved(base)
    patch = made_patch(base, DOWN)
    apply_patch(patch, base, tmp_path / "zero", scale=0.0)
    same = hashes(tmp_path / "zero")
    del same["expunge.json"]
    assert same == hashes(base)
    apply_patch(patch, base, tmp_path / "out")
    with pytest.raises(PatchError, match=f"{DOWN} differs from its base"):
        apply_patch(patch, tmp_path / "out", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("stores_both", [False, True])
def test_tied_embeddings_stay_tied(tmp_path, stores_both):
    base, out = tmp_path / "base", tmp_path / "out"
    model = saved(base, tie_word_embeddings=True)
    if stores_both:
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    patch = made_patch(base, "model.embed_tokens.weight")
    apply_patch(patch, base, out)
    patch.apply_(model)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_old_gpt2_names(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    model = saved(base, "GPT2")
    path = base / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    patch = made_patch(base, "transformer.h.1.mlp.c_proj.weight")
    apply_patch(patch, base, out)
    patch.apply_(model)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_what_is_copied(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    saved(base)
    patch = made_patch(base, DOWN)
    copied = ["README.md", "LICENSE", "chat_template.jinja", "code/modeling.py"]
    left = [
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "old.pt", "x.pkl", "model.gguf"),
        *("consolidated.safetensors", "original/consolidated.00.pth", ".git/HEAD"),
        module.INDEX,  # of shards that are not used beside a single file
    ]
    for name in (*copied, *left):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("x")
    for file in base.rglob("*"):
        if file.is_file():
            file.chmod(0o444)
    out.mkdir()
    apply_patch(patch, base, out)
    expected = set(hashes(base)) - set(left) | {"expunge.json"}
    assert set(hashes(out)) == expected
    assert os.access(out / "config.json", os.W_OK)


def test_a_linked_cache_directory(tmp_path):
    base, links = tmp_path / "base", tmp_path / "links"
    saved(base)
    before = hashes(base)
    links.mkdir()
    for file in base.iterdir():
        (links / file.name).symlink_to(file)
    out = apply_patch(made_patch(links, DOWN), links, tmp_path / "out")
    assert not any(file.is_symlink() for file in out.iterdir())
    assert hashes(base) == before


def test_outputs_that_are_refused(tmp_path):
    base = tmp_path / "base"
    saved(base)
    patch, before = made_patch(base, DOWN), hashes(base)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("x")
    link = tmp_path / "link"
    link.symlink_to(base)
    for out, match in (
        (base, "is the base model or lies inside"),
        (base / "sub", "is the base model or lies inside"),
        (link / "sub", "is the base model or lies inside"),
        (tmp_path / "full" / ".." / "base", "is the base model or lies inside"),
        (full, "is not empty"),
        (full / "mine.txt", "is not empty"),
        (tmp_path, "is not empty"),
    ):
        with pytest.raises(ModelError, match=match):
            apply_patch(patch, base, out)
    with pytest.raises(PatchError, match="finite number"):
        apply_patch(patch, base, tmp_path / "out", scale=float("nan"))
    assert hashes(base) == before
    assert not (tmp_path / "out").exists()


def test_bases_that_are_refused(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    saved(base)
    patch = made_patch(base, DOWN)
    path = base / "model.safetensors"
    tensors = load_file(path)
    for value, error, match in (
        (tensors[DOWN] + 1, PatchError, "differs from its base"),
        (tensors[DOWN].bfloat16(), PatchError, "differs from its base"),
        (torch.zeros(2, 2), PatchError, "another shape"),
        (torch.zeros(32, 48, dtype=torch.int8), ModelError, "stored quantised"),
    ):
        save_file(tensors | {DOWN: value}, path)
        with pytest.raises(error, match=match):
            apply_patch(patch, base, out)
    save_file({name: value for name, value in tensors.items() if name != DOWN}, path)
    with pytest.raises(ModelError, match="does not store"):
        apply_patch(patch, base, out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base"]


def test_overflow_leaves_nothing(tmp_path):
    base = tmp_path / "base"
    saved(base, dtype=torch.float16)
    with pytest.raises(PatchError, match="is not finite"):
        apply_patch(made_patch(base, DOWN, size=1e6), base, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base"]


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    saved(base)
    patch = made_patch(base, DOWN)
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patched.setattr(module.shutil, "disk_usage", lambda _path: usage)
        with pytest.raises(ResourceError, match="no room"):
            apply_patch(patch, base, out)

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "fsync", full)
        with pytest.raises(ResourceError, match="disk is full"):
            apply_patch(patch, base, out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base"]
    assert apply_patch(patch, base, out).is_dir()


def test_interrupted_and_killed_attempts(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    saved(base)
    patch = made_patch(base, DOWN)

    def interrupt(_done, _total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_patch(patch, base, out, on_progress=interrupt)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base"]

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    killed, running = tmp_path / f".out.{gone.pid}.tmp", tmp_path / ".out.1.tmp"
    for left in (killed, running):
        left.mkdir()
        (left / "model.safetensors").write_text("half")
    apply_patch(patch, base, out)
    assert not killed.exists()
    assert running.exists()  # process 1 is alive: another attempt at work
