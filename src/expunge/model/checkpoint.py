"""A Hugging Face model directory: looked at without loading, and opened whole or truncated."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from expunge.data.tokens import check_vocabulary
from expunge.errors import ModelError, ResourceError
from expunge.files import local_path
from expunge.model.memory import is_out_of_memory
from expunge.model.patch import BaseTensor
from expunge.model.shards import TensorInfo, read_json, read_tensors

DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]


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
        path = local_path(directory)
        if not path.is_dir():
            path = _download(str(directory))
        config = read_json(path / "config.json", "a model directory has a config.json")
        _check_causal_lm(path, config)
        return cls(path, config, read_tensors(path))

    @cached_property
    def text_config(self) -> Any:
        """The config of the text part, under transformers' names whatever the file calls them.

        A model with code of its own has no such names: there, the file's are taken as they are.
        """
        from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

        kind = AutoConfig if self.config.get("model_type") in CONFIG_MAPPING else PretrainedConfig
        with _load_errors(self.directory, "config"):
            whole = kind.from_pretrained(self.directory, local_files_only=True)
            return whole.get_text_config(decoder=True)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers. Raises ModelError if the config does not say."""
        return self._size("num_hidden_layers")

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream. Raises ModelError if the config does not say."""
        return self._size("hidden_size")

    @property
    def intermediate_size(self) -> int:
        """Input width of the layers' last projection; where the config does not say, the usual."""
        names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
        sizes = (getattr(self.text_config, name, None) for name in names)
        usual = self.hidden_size * getattr(self.text_config, "expansion_ratio", 4)
        return int(next((size for size in sizes if isinstance(size, int)), usual))

    def _size(self, name: str) -> int:
        size = getattr(self.text_config, name, None)
        if not isinstance(size, int) or size < 1:
            raise ModelError(
                what=f"The config of {self.directory} does not say how large the model is",
                got=f"{name} {size!r}, model_type {self.config.get('model_type')!r}",
                allowed=f"a config with {name}",
                fix="save the model again with save_pretrained",
            )
        return size

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

    def base_tensors(self, parameter_names: Iterable[str]) -> dict[str, BaseTensor]:
        """What a `Patch` needs to know of the originals, by their causal-LM names."""
        found = {name: self.tensors[self.resolve(name)] for name in parameter_names}
        return {
            name: BaseTensor(info.fingerprint(), info.dtype, info.shape)
            for name, info in found.items()
        }


def open_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory. Raises ModelError if it cannot be loaded whole."""
    from transformers import AutoTokenizer

    with quiet(), _load_errors(directory, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        # Where the files are missing, transformers makes one that knows its special tokens only.
        if len(tokenizer) <= len(tokenizer.get_added_vocab()):
            raise ValueError("no vocabulary: the tokenizer files are missing")
    return tokenizer


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

    Raises ModelError if model or tokenizer cannot be loaded whole or do not belong together,
    ResourceError if it does not fit into memory.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    path = Checkpoint.open(directory).directory
    common = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    tokenizer = open_tokenizer(path, trust_remote_code=trust_remote_code)
    with quiet(), _load_errors(path, "model"):
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
        model = model.to(device).eval()
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    return model, tokenizer


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
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars; unused weights are meant here."""
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
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    # What transformers raises for missing files, bad JSON, unknown types, fields of another kind,
    # shapes that do not fit, and for packages that a model asks for.
    except (
        *(OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError),
        *(AttributeError, MemoryError, StrictDataclassError),
    ) as error:
        if is_out_of_memory(error):
            raise ResourceError(
                what=f"The {part} of {path} does not fit into memory",
                got=str(error),
                allowed="room for the weights in the chosen dtype",
                fix="use bfloat16, fewer layers, or a larger device",
            ) from error
        raise ModelError(
            what=f"The {part} of {path} cannot be loaded",
            got=f"{type(error).__name__}: {str(error)[:500]}",
            allowed=f"a {part} that transformers loads from this directory alone",
            fix="save it again with save_pretrained; a model with its own code needs "
            "trust_remote_code, after you have read that code",
        ) from error
