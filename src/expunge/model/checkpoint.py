"""A Hugging Face model directory: looked at without loading, opened truncated, patched by copy."""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from expunge.errors import ModelError, PatchError, ResourceError
from expunge.files import disk_errors, write_json
from expunge.model.patch import BaseTensor, Patch, add, causal_lm_name, mismatch
from expunge.model.shards import (
    BLOCK_BYTES,
    FLOATS,
    INDEX,
    SINGLE,
    TensorInfo,
    dtype_name,
    fingerprint,
    raw_bytes,
    read_json,
    read_tensors,
)

__all__ = ["Checkpoint", "apply_patch", "causal_lm_name", "fingerprint", "open_model"]

PATCH_INFO = "expunge.json"
DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]
# Weights in other forms: some can run code, and all would carry the unpatched function along.
WEIGHT_SUFFIXES = {
    *(".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".safetensors", ".npz"),
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a model directory say, without its weights.

    Attributes:
        config: ``config.json`` as it is.
        tensors: name on disk -> file, dtype, shape, bytes.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Read config and safetensors headers of a directory, or of a model named on the Hub.

        Raises ModelError if there is no causal LM stored in whole safetensors files.
        """
        path = Path(directory)
        if not path.is_dir():
            path = _download(str(directory))
        config = read_json(path / "config.json", "a model directory has a config.json")
        _check_causal_lm(path, config)
        return cls(path, config, read_tensors(path))

    @property
    def n_layers(self) -> int:
        """Number of decoder layers, from the config (of the text part, where there are several)."""
        text = self.config.get("text_config", self.config)
        return int(text.get("num_hidden_layers") or text.get("n_layer") or text["num_layers"])

    def resolve(self, parameter_name: str) -> str:
        """The name on disk of a loaded causal LM's parameter.

        The two may differ by leading components (``transformer.h.0.…`` and ``h.0.…``), never by a
        layer number. Raises ModelError if no tensor or more than one answers.
        """
        if parameter_name in self.tensors:
            return parameter_name
        parts = parameter_name.split(".")
        # The shortest tail that still says which tensor: from the word before the layer number
        # on, or module and parameter.
        numbers = [at for at, part in enumerate(parts) if part.isdigit()]
        last = numbers[0] - 1 if numbers else len(parts) - 2
        matches: list[str] = []
        for start in range(max(last, 0) + 1):
            tail = ".".join(parts[start:])
            matches = [name for name in self.tensors if _is_prefixed(name, tail)]
            if matches:
                break
        if len(matches) == 1:
            return matches[0]
        raise ModelError(
            what=f"{self.directory} does not store {parameter_name} under one name",
            got=", ".join(matches) or f"{len(self.tensors)} tensors, such as {min(self.tensors)}",
            allowed="the same name, with or without a prefix such as 'model.'",
            fix="train tensors that are stored as they are (no merged experts, no tied copy), "
            "or save the model again with save_pretrained",
        )

    def fingerprint(self, name: str) -> str:
        """Fingerprint of a tensor, by its name on disk; reads only that tensor."""
        return self.tensors[name].fingerprint()

    def base_tensors(self, parameter_names: Iterable[str]) -> dict[str, BaseTensor]:
        """What a `Patch` needs to know of the originals, by their causal-LM names."""
        found = {name: self.tensors[self.resolve(name)] for name in parameter_names}
        return {
            name: BaseTensor(info.fingerprint(), info.dtype, info.shape)
            for name, info in found.items()
        }


def open_model(
    directory: str | Path,
    *,
    layers: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Load ``(model, tokenizer)``, in evaluation mode.

    Args:
        layers: None for the whole causal LM. With n, only decoder layers 0 to n-1 are read from
            disk and there is no LM head: the class is that of `AutoModel`, and its parameters
            lack the prefix that `causal_lm_name` gives back. The output of its last layer
            equals ``hidden_states[n]`` of the whole model; its final norm is not to be used.

    Raises ModelError if model or tokenizer cannot be loaded whole, ResourceError if it does not
    fit into memory.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    path = Checkpoint.open(directory).directory
    common = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with _quiet(), _load_errors(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
        # Where the files are missing, transformers makes one that knows its special tokens only.
        if len(tokenizer) <= len(tokenizer.get_added_vocab()):
            raise ValueError("no vocabulary: the tokenizer files are missing")
    with _quiet(), _load_errors(path, "model"):
        config = AutoConfig.from_pretrained(path, **common)
        factory = AutoModelForCausalLM
        if layers is not None:
            config, factory = _truncated(config, layers), AutoModel
        model, report = factory.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to tell which, below
            **common,
        )
        # transformers fills them with random numbers.
        wrong = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
        if wrong:
            raise ValueError(f"no weights, or of another shape, for {', '.join(wrong[:5])}")
        return model.to(device).eval(), tokenizer


def apply_patch(
    patch: Patch,
    directory: str | Path,
    out: str | Path,
    *,
    scale: float = 1.0,
    on_progress: Progress | None = None,
) -> Path:
    """Write a copy of the base with ``scale`` × the patch added; returns ``out``.

    Only the bytes of the changed tensors differ from the base; one tensor is held in memory at
    a time. ``expunge.json`` tells what was done. Weights in other forms than the model's
    safetensors are not copied. ``out`` is complete or absent.

    Args:
        on_progress: called with bytes done and bytes in all.

    Raises PatchError (another base, or a sum that does not fit the dtype on disk), ModelError
    (unsuitable ``out`` or base), ResourceError (disk full).
    """
    if not math.isfinite(scale):
        raise PatchError(
            what="The scale of a patch is a finite number",
            got=str(scale),
            allowed="1 for the patch as trained, 0.5 for half of it, -1 to undo it",
            fix="pass a number",
        )
    checkpoint, out = Checkpoint.open(directory), Path(out)
    _check_out(checkpoint.directory, out)
    targets = _verified_targets(checkpoint, patch)
    files = list(_copied_files(checkpoint))
    total = sum(file.stat().st_size for file in files)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _building(out, total) as work:
        done = 0
        for file in files:
            target = work / file.relative_to(checkpoint.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            for copied in _copy(file, target):
                done += copied
                if on_progress:
                    on_progress(done, total)
        for name, infos in targets.items():
            for info in infos:
                changed = add(name, info.read(), patch.deltas[name], scale)
                with (work / info.file.relative_to(checkpoint.directory)).open("r+b") as handle:
                    handle.seek(info.start)
                    handle.write(raw_bytes(changed))
                    handle.flush()
                    os.fsync(handle.fileno())
        base = {name: tensor.to_dict() for name, tensor in patch.base.items()}
        write_json(work / PATCH_INFO, {"scale": scale, "metadata": patch.metadata, "changed": base})
    return out


# ---- reading a directory


def _download(name: str) -> Path:
    """Fetch a model from the Hub because the user named it; ModelError if there is none."""
    got = "no such directory"
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            # Subfolders and `consolidated` hold the same weights a second time.
            return Path(
                snapshot_download(
                    name, allow_patterns=DOWNLOADED, ignore_patterns=["*/*", "consolidated*"]
                )
            )
        except (OSError, ValueError, HfHubHTTPError) as error:
            first_line = (str(error).splitlines() or [""])[0]
            got = f"no such directory, and from the Hub {type(error).__name__}: {first_line}"
    raise ModelError(
        what=f"There is no model at {name}",
        got=got,
        allowed="a directory with config.json and safetensors files, or owner/name on the Hub",
        fix="check the path; for a gated model log in with `hf auth login` first",
    )


def _check_causal_lm(path: Path, config: dict[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    kind = config.get("model_type")
    stored = config.get("architectures") or [KNOWN.get(kind)]
    names = {str(name).lower() for name in KNOWN.values()}
    is_known = kind in KNOWN and any(str(name).lower() in names for name in stored)
    if not is_known and "AutoModelForCausalLM" not in (config.get("auto_map") or {}):
        raise ModelError(
            what=f"{path} holds no causal language model",
            got=f"model_type {kind!r}, architectures {config.get('architectures')}",
            allowed="an architecture that AutoModelForCausalLM knows, saved with its head",
            fix="choose a decoder such as Llama, Qwen, Gemma, OLMo, Phi or GPT-2",
        )


def _is_prefixed(name: str, tail: str) -> bool:
    """Whether ``name`` is ``tail``, perhaps after components that are no layer number."""
    if name == tail:
        return True
    return name.endswith("." + tail) and not any(
        part.isdigit() for part in name[: -len(tail)].split(".")
    )


# ---- loading


def _truncated(config: Any, layers: int) -> Any:
    """A copy of ``config`` for the first ``layers`` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    total = text.num_hidden_layers
    if not 1 <= layers <= total:
        raise ModelError(
            what="The model has no such layers",
            got=f"{layers} layers asked for",
            allowed=f"1 to {total}",
            fix="choose a layer that the model has",
        )
    # Gemma 3n and 4 tie the first layers to the number of all: late ones reuse early keys, and
    # one tensor holds something for each layer.
    whole_only = ("num_kv_shared_layers", "hidden_size_per_layer_input")
    if layers < total and any(getattr(text, key, None) for key in whole_only):
        raise ModelError(
            what="This architecture cannot be opened truncated",
            got=f"{text.model_type}, with layers that share keys or per-layer embeddings",
            allowed="decoders whose first layers do not depend on the later ones",
            fix="open the whole model, or choose another base model",
        )
    # One entry for each layer: layer_types, attention_layers, no_rope_layers, …
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == total and re.search("layer|pattern", key):
            setattr(text, key, value[:layers])
    text.num_hidden_layers = layers
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings (unused weights are meant here) and progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _load_errors(path: Path, part: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            what=f"The {part} of {path} does not fit into memory",
            got=str(error),
            allowed="room for the weights in the chosen dtype",
            fix="use bfloat16, fewer layers, or a larger device",
        ) from error
    # What transformers raises for missing files, bad JSON, unknown types, shapes that do not
    # fit, and for packages that a model asks for.
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError) as error:
        raise ModelError(
            what=f"The {part} of {path} cannot be loaded",
            got=f"{type(error).__name__}: {str(error)[:500]}",
            allowed=f"a {part} that transformers loads from this directory alone",
            fix="save it again with save_pretrained; a model with its own code needs "
            "trust_remote_code, after you have read that code",
        ) from error


# ---- applying a patch


def _check_out(base: Path, out: Path) -> None:
    real_base, real_out = base.resolve(), out.resolve()
    if real_out == real_base or real_base in real_out.parents:
        got = f"{out}, which is the base model or lies inside it"
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        got = f"{out}, which is not empty"
    else:
        return
    raise ModelError(
        what="The patched model needs a directory of its own",
        got=got,
        allowed="a new or empty directory outside the base model",
        fix="choose another output directory (-o), or remove the old one first",
    )


def _verified_targets(checkpoint: Checkpoint, patch: Patch) -> dict[str, list[TensorInfo]]:
    """Patch name -> the tensors on disk to change, after checking that they are the base's."""
    targets = {}
    for name, base in patch.base.items():
        disk_name = checkpoint.resolve(name)
        info = checkpoint.tensors[disk_name]
        if info.dtype not in FLOATS.values():
            raise ModelError(
                what=f"{name} is stored quantised",
                got=dtype_name(info.dtype),
                allowed=", ".join(dtype_name(dtype) for dtype in FLOATS.values()),
                fix="apply the patch to the model as it was before quantisation",
            )
        if BaseTensor((got := info.fingerprint()), info.dtype, info.shape) != base:
            raise mismatch(name, base, got, info.shape)
        targets[name] = [info, *_tied_copies(checkpoint, disk_name, got)]
    return targets


def _tied_copies(checkpoint: Checkpoint, name: str, expected: str) -> list[TensorInfo]:
    """Further copies on disk of an embedding that is tied to the head.

    Left as they were, they would differ from it, and transformers would then untie the two.
    """
    info = checkpoint.tensors[name]
    if any(part.isdigit() for part in name.split(".")):
        return []
    return [
        other
        for other_name, other in checkpoint.tensors.items()
        if other_name != name
        and (other.dtype, other.shape) == (info.dtype, info.shape)
        and not any(part.isdigit() for part in other_name.split("."))
        and other.fingerprint() == expected
        and _is_tied(checkpoint)
    ]


def _is_tied(checkpoint: Checkpoint) -> bool:
    from transformers import AutoConfig

    # The default differs by model type, so the raw config does not tell.
    config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    return bool(config.get_text_config().tie_word_embeddings)


def _copied_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """The shards in use, and everything else that holds no weights."""
    shards = {info.file for info in checkpoint.tensors.values()}
    is_sharded = SINGLE not in {file.name for file in shards}
    for file in sorted(checkpoint.directory.rglob("*")):
        relative = file.relative_to(checkpoint.directory)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        is_other_weights = file.suffix.lower() in WEIGHT_SUFFIXES and file not in shards
        is_other_index = file.name.endswith(".index.json") and not (
            is_sharded and str(relative) == INDEX
        )
        if file.is_file() and not (is_hidden or is_other_weights or is_other_index):
            yield file


@contextmanager
def _building(out: Path, needed: int) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place on success, else vanishes."""
    for stale in out.parent.glob(f".{out.name}.*.tmp"):
        owner = stale.name.split(".")[-2]
        if stale.is_dir() and owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(stale)  # an earlier attempt that was killed
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise ResourceError(
            what=f"The disk has no room for the patched model in {out.parent}",
            got=f"{free / 1e9:.2f} GB free",
            allowed=f"{needed / 1e9:.2f} GB, the size of the base model",
            fix="free some space, or choose an output directory on another disk (-o)",
        )
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(out):
            work.mkdir()
            yield work
            if out.exists():
                out.rmdir()  # empty, as checked
            work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _copy(source: Path, target: Path) -> Iterator[int]:
    """Copy contents, yielding the bytes of each block. The mode is not copied: bases may be
    read-only."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(BLOCK_BYTES):
            writer.write(block)
            yield len(block)
        writer.flush()
        os.fsync(writer.fileno())
