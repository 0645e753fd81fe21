"""Find the parts of a causal language model by shape and by call order, not by name.

A decoder layer is traced once with a few tokens. Its **projection** is the last linear map it
calls that writes to the residual stream (`mlp.down_proj` of Llama, `mlp.c_proj` of GPT-2, …). Its
**tail** is what the layer does after that product: a norm (Gemma, OLMo), nothing (Llama), and an
addition to the residual. When the trace shows that the layer's output is exactly
``residual + tail(projection(x))``, everything before the product belongs to the prefix.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from expunge.errors import ModelError
from expunge.model.hooks import stop, stopping


@dataclass(frozen=True)
class Structure:
    """Where the parts of one loaded model are.

    Attributes:
        backbone: the model without its head.
        layers: the decoder layers, in order.
        layers_name: dotted name of ``layers`` inside the loaded model.
        projection: dotted name of the projection inside a layer.
        tail: dotted names, inside a layer, of the modules applied to the projection's output.
        residual_input: dotted name of the module whose input is the residual that the tail is
            added to; None: the residual is recovered by subtraction.
        splits_at_product: whether the layer may be cut right before its projection; False: the
            layer combines the product in another way and is cut at its input.
        returns_tuple: whether a layer returns a tuple whose first item is the hidden state.
        final_norm: the norm after the last layer, or None.
        head: the output embedding, or None for a model without head.
        hidden_size: D.
    """

    backbone: nn.Module
    layers: nn.ModuleList
    layers_name: str
    projection: str
    tail: tuple[str, ...]
    residual_input: str | None
    splits_at_product: bool
    returns_tuple: bool
    final_norm: nn.Module | None
    head: nn.Module | None
    hidden_size: int

    @property
    def n_layers(self) -> int:
        """Number of decoder layers that are loaded."""
        return len(self.layers)

    def projection_of(self, layer: int) -> nn.Module:
        """The projection module of a layer (0-based)."""
        return self.layers[layer].get_submodule(self.projection)

    def returned(self, acts_BTD: Tensor) -> Any:
        """Hidden states as a layer of this model returns them."""
        return (acts_BTD,) if self.returns_tuple else acts_BTD

    def weight_name(self, layer: int) -> str:
        """Name of the projection's weight inside the loaded model."""
        return f"{self.layers_name}.{layer}.{self.projection}.weight"


def find_structure(model: Any) -> Structure:
    """Inspect a loaded Hugging Face causal LM (with or without head).

    Raises:
        ModelError: no stack of decoder layers is found, or its layers have no projection that
            sees every token (for example a mixture of experts with fused expert tensors).
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            what="Encoder-decoder models are not supported",
            got=type(model).__name__,
            allowed="a decoder-only causal language model",
            fix="choose a causal LM, one that AutoModelForCausalLM opens and that has no encoder",
        )
    config = model.config.get_text_config()
    layers_name, layers = _find_layers(model, int(config.num_hidden_layers))
    backbone = model.get_submodule(layers_name.rpartition(".")[0])
    trace = _trace_layer(model, backbone, layers[0])
    projection = _find_projection(layers, trace, int(config.hidden_size))
    tail = _find_tail(trace, projection)
    residual_input, additive = _find_residual(model, backbone, layers[0], trace, projection, tail)
    return Structure(
        backbone=backbone,
        layers=layers,
        layers_name=layers_name,
        projection=projection,
        tail=tail,
        residual_input=residual_input,
        splits_at_product=additive,
        returns_tuple=trace.returns_tuple,
        final_norm=_last_norm(backbone, layers),
        head=model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None,
        hidden_size=int(config.hidden_size),
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map with a 2-D weight (GPT-2's transposed Conv1D included)."""
    return isinstance(module, (nn.Linear, Conv1D))


def _find_layers(model: Any, count: int) -> tuple[str, nn.ModuleList]:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and any(is_linear(part) for part in module[0].modules())
    ]
    if not found:
        raise ModelError(
            what="No stack of decoder layers was found in this model",
            got=f"{type(model).__name__} without a ModuleList of {count} layers",
            allowed="a decoder-only causal language model with config.num_hidden_layers layers",
            fix="check that the model is a causal LM with one stack of layers",
        )
    # The outermost list: an inner one (experts, say) may have the same length by chance.
    return min(found, key=lambda item: item[0].count("."))


@dataclass
class _Call:
    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


@dataclass
class _Trace:
    calls: list[_Call]
    output: Tensor
    returns_tuple: bool


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


@torch.no_grad()
def _trace_layer(
    model: Any, backbone: nn.Module, layer: nn.Module, *, nudge: str | None = None
) -> _Trace:
    """Run a few tokens through the first layer; ``nudge`` changes one submodule's output."""
    calls: list[_Call] = []
    result: list[Any] = []
    handles = []
    for name, module in layer.named_modules():
        if name and not any(True for _ in module.children()):
            if name == nudge:
                # Not a mere factor: a norm in the tail would take it back and hide a gate.
                handles.append(
                    module.register_forward_hook(lambda _m, _i, out: 2 * out.roll(1, -1))
                )

            def record(part: nn.Module, args: Any, out: Any, name: str = name) -> None:
                if args and isinstance(args[0], Tensor) and isinstance(_first(out), Tensor):
                    calls.append(_Call(name, part, args[0], _first(out)))

            handles.append(module.register_forward_hook(record))

    def finish(_module: nn.Module, _args: Any, out: Any) -> None:
        result.append(out)
        stop()

    handles.append(layer.register_forward_hook(finish))
    vocabulary = int(model.config.get_text_config().vocab_size)
    device = next(layer.parameters()).device
    ids_BT = (torch.arange(10, device=device).view(2, 5) * 7 + 3) % vocabulary
    training = model.training
    model.eval()
    try:
        with stopping():
            backbone(input_ids=ids_BT, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not result:
        raise ModelError(
            what="The first decoder layer never ran",
            got=f"{type(model).__name__}: its forward does not call {type(layer).__name__}",
            allowed="a model whose forward calls its decoder layers as modules",
            fix="report the architecture; a compiled or scripted model must be opened uncompiled",
        )
    return _Trace(calls, _first(result[0]), isinstance(result[0], tuple))


def _find_projection(layers: nn.ModuleList, trace: _Trace, hidden: int) -> str:
    fused = [name for name, tensor in layers[0].named_parameters() if tensor.ndim == 3]
    if fused:
        raise ModelError(
            what="Mixture-of-experts layers are not supported yet",
            got=f"fused expert tensors: {', '.join(fused)}",
            allowed="layers whose MLP ends in one linear map that every token passes",
            fix="what is missing is training and patching 3-D expert weights; use a dense model",
        )
    linears = [
        call
        for call in trace.calls
        if is_linear(call.module) and call.output.shape == trace.output.shape
    ]
    if not linears or linears[-1].output.shape[-1] != hidden:
        raise ModelError(
            what="No MLP output projection was found in the decoder layers",
            got=", ".join(call.name for call in trace.calls) or "no submodule was called",
            allowed=f"a linear map to the hidden size {hidden} that sees every token",
            fix="use a dense decoder; quantised layers must be opened in full precision",
        )
    name = linears[-1].name
    parts = [dict(layer.named_modules()).get(name) for layer in layers]
    if any(part is None or not is_linear(part) for part in parts):
        raise ModelError(
            what="The decoder layers differ from each other",
            got=f"{name} exists in layer 0 but not in every layer",
            allowed="a stack of layers of one kind",
            fix="hybrid stacks are not supported yet",
        )
    return name


def _find_tail(trace: _Trace, projection: str) -> tuple[str, ...]:
    """The chain of modules that pass the projection's output on, by tensor identity."""
    start = max(i for i, call in enumerate(trace.calls) if call.name == projection)
    current = trace.calls[start].output
    tail = []
    for call in trace.calls[start + 1 :]:
        if call.input is current or call.input.data_ptr() == current.data_ptr():
            tail.append(call.name)
            current = call.output
    return tuple(tail)


def _tail_output(trace: _Trace, projection: str, tail: tuple[str, ...]) -> Tensor:
    last = tail[-1] if tail else projection
    return next(call.output for call in reversed(trace.calls) if call.name == last)


def _find_residual(
    model: Any,
    backbone: nn.Module,
    layer: nn.Module,
    trace: _Trace,
    projection: str,
    tail: tuple[str, ...],
) -> tuple[str | None, bool]:
    """Where the residual can be read, and whether the layer really adds the tail to it."""
    tail_BTD = _tail_output(trace, projection, tail)
    before = trace.calls[: next(i for i, c in enumerate(trace.calls) if c.name == projection)]
    for call in before:
        if call.input.shape == trace.output.shape and torch.equal(
            call.input + tail_BTD, trace.output
        ):
            residual_input, residual_BTD = call.name, call.input
            break
    else:
        residual_input, residual_BTD = None, trace.output - tail_BTD
    # One more trace with another product: a layer that scales or gates the sum fails here.
    nudged = _trace_layer(model, backbone, layer, nudge=projection)
    expected_BTD = residual_BTD + _tail_output(nudged, projection, tail)
    tolerance = 1e-4 if trace.output.dtype == torch.float32 else 2e-2
    scale = float(trace.output.abs().max()) or 1.0
    additive = bool(((expected_BTD - nudged.output).abs().max() / scale) < tolerance)
    return residual_input, additive


def _last_norm(backbone: nn.Module, layers: nn.ModuleList) -> nn.Module | None:
    """The backbone's own child, after the layers, that holds a single vector of weights."""
    children = list(backbone.children())
    position = next(i for i, child in enumerate(children) if child is layers)
    for child in children[position + 1 :]:
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1:
            return child
    return None
