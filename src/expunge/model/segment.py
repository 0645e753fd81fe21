"""The engine: run only the part of a model that an objective can move.

The model is cut at the trained layers, first to last:

    prefix   everything before the first trained product; no gradient; once per text
    segment  from that product to the deepest layer an objective reads; every step
    suffix   everything above; never run, and never loaded when the model is opened truncated,
             unless the objective reads log-probabilities, which takes all layers and the head

A layer's projection is the last product of its layer, so even the first trained layer's attention
and gate/up belong to the prefix. What crosses the cut is a **boundary**: the projection's input
and the residual it is added to. The retain term's reference, the original activations, is read in
the same pass that computes the boundary, before the first step: no second model.

The model's own forward runs all parts, with the layers below the cut replaced by a pass-through:
masks, rotary embeddings, sliding windows and norms stay the model's business.

Shapes: B batch, T tokens, I projection input, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from expunge.errors import ModelError, RecipeError, TrainingError
from expunge.model.hooks import entered_with, entering, forward_as, hooked, stop, stopping
from expunge.model.structure import Structure

# Stands among captured layers for the head's output: the log-probability of each token given those
# before it, in nats, of shape BT1; 0 at the first token, which nothing predicts.
LOGPROBS = -1


@dataclass(frozen=True)
class Boundary:
    """What crosses from the prefix to the segment, for one batch of texts.

    Attributes:
        input_BTI: input of the first trained projection; when the layer cannot be cut at its
            product, the layer's own input, of shape BTD.
        residual_BTD: what the layer adds its tail to; None when cut at the layer's input.
        reference: original activations after each captured layer, layer -> BTD; empty if not
            asked for.
    """

    input_BTI: Tensor
    residual_BTD: Tensor | None
    reference: Mapping[int, Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> Boundary:
        """The same boundary with ``function`` applied to every tensor."""
        return replace(
            self,
            input_BTI=function(self.input_BTI),
            residual_BTD=None if self.residual_BTD is None else function(self.residual_BTD),
            reference={layer: function(acts) for layer, acts in self.reference.items()},
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order: input, residual (if any), references by layer."""
        residual = [] if self.residual_BTD is None else [self.residual_BTD]
        return [self.input_BTI, *residual, *(self.reference[k] for k in sorted(self.reference))]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Boundary:
        """Inverse of `tensors`, with other values."""
        rest = iter(tensors)
        return Boundary(
            next(rest),
            None if self.residual_BTD is None else next(rest),
            {layer: next(rest) for layer in sorted(self.reference)},
        )


class Segment:
    """A loaded model, cut at the trained layers.

    Args:
        model: a Hugging Face causal LM, with or without head, whole or opened truncated.
        structure: of the same model.
        trained: 0-based layers whose projection is trained.
        captured: 0-based layers whose output the objective reads, and `LOGPROBS`, for a model
            with its head.

    Raises:
        RecipeError: a layer is out of range, or no trained layer can move a captured one, or one
            trained moves none.
        ModelError: log-probabilities are read of a model without head.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        *,
        trained: Sequence[int],
        captured: Sequence[int],
    ) -> None:
        self.model, self.structure = model, structure
        self.trained, self.captured = tuple(sorted(set(trained))), tuple(sorted(set(captured)))
        self.reads_logprobs = LOGPROBS in self.captured
        self.layers_read = tuple(layer for layer in self.captured if layer != LOGPROBS)
        self._check_layers()
        self.reads_only_logprobs = self.captured == (LOGPROBS,)
        self.first, self.last = self.trained[0], self.captured[-1]
        names = {layer: structure.weight_name(layer) for layer in self.trained}
        self.weights: dict[str, nn.Parameter] = {
            name: structure.projection_of(layer).weight  # type: ignore[misc]
            for layer, name in names.items()
        }

    def _check_layers(self) -> None:
        n = self.structure.n_layers
        wrong = [layer for layer in (*self.trained, *self.layers_read) if not 0 <= layer < n]
        if wrong or not self.trained or not self.captured:
            raise RecipeError(
                what="A layer is out of range",
                got=f"layer {wrong[0]}" if wrong else "no layer",
                allowed=f"0 to {n - 1}",
                fix="set --layer within the range, or --layer auto",
            )
        if self.reads_logprobs and self.structure.head is None:
            raise ModelError(
                what="Log-probabilities are read of a model without its head",
                got=f"{type(self.model).__name__} with {n} layers",
                allowed="a causal language model with all layers and its output embedding",
                fix="open the whole model, without a number of layers",
            )
        if self.layers_read:
            self._check_reach()

    def _check_reach(self) -> None:
        if self.trained[-1] > self.layers_read[-1]:
            raise RecipeError(
                what="A trained layer lies above every layer that the objective reads",
                got=f"trained {self.trained}, read {self.layers_read}",
                allowed="trained layers at or below the deepest layer read",
                fix="raise --layer, or train lower layers",
            )
        if self.layers_read[0] < self.trained[0]:
            raise RecipeError(
                what="The objective reads a layer below every trained layer",
                got=f"trained {self.trained}, read {self.layers_read}",
                allowed="reading at or above the lowest trained layer; others cannot change",
                fix="raise --layer, or train lower layers",
            )

    @property
    def device(self) -> torch.device:
        """Where the segment's weights are."""
        return next(iter(self.weights.values())).device

    def boundary_width(self, *, reference: bool) -> int:
        """Numbers that a boundary holds of each token."""
        hidden = self.structure.hidden_size
        inner = next(iter(self.weights.values())).numel() // hidden
        cut = inner + hidden if self.structure.splits_at_product else hidden
        return cut + (len(self.layers_read) * hidden + self.reads_only_logprobs if reference else 0)

    def boundary(self, ids_BT: Tensor, mask_BT: Tensor, *, reference: bool) -> Boundary:
        """Run the prefix, and with ``reference`` the original segment, without gradient.

        Must run while the trained weights are the original ones.
        """
        cut_at_product = self.structure.splits_at_product
        layer = self.structure.layers[self.first]
        seen: dict[str, Tensor] = {}
        references: dict[int, Tensor] = {}
        recover_residual = cut_at_product and self.structure.residual_input is None
        run_on = reference or recover_residual

        def see_input(_module: nn.Module, args: Any, kwargs: Any) -> None:
            seen["input"] = entering(args, kwargs)
            if not run_on:
                stop()

        def see_residual(_module: nn.Module, args: Any) -> None:
            seen["residual"] = args[0]

        def see_output(_module: nn.Module, _args: Any, output: Any) -> None:
            seen["output"] = output[0] if isinstance(output, tuple) else output
            if not reference:
                stop()

        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(_evaluating(self.model))
            where = self._first_projection() if cut_at_product else layer
            if cut_at_product and self.structure.residual_input is not None:
                source = layer.get_submodule(self.structure.residual_input)
                stack.enter_context(hooked(source.register_forward_pre_hook(see_residual)))
            handle = where.register_forward_pre_hook(see_input, with_kwargs=True)
            stack.enter_context(hooked(handle))
            if recover_residual:
                stack.enter_context(hooked(layer.register_forward_hook(see_output)))
            if reference:
                stack.enter_context(self._capturing(references, self.reads_only_logprobs))
            with stopping():
                references |= self._model_forward(ids_BT, mask_BT, self.reads_only_logprobs)
            if recover_residual:
                seen["residual"] = seen["output"] - self._tail(seen["input"])
        needed = {"input"} | ({"residual"} if cut_at_product else set())
        if not needed <= seen.keys():
            raise TrainingError(
                what="The boundary before the first trained layer was never reached",
                got=f"layer {self.first} saw {sorted(seen) or 'nothing'}",
                allowed=f"captures of {sorted(needed)}",
                fix="report the architecture; open the model without compilation",
            )
        return Boundary(seen["input"], seen.get("residual"), references)

    def forward(
        self,
        boundary: Boundary,
        ids_BT: Tensor,
        mask_BT: Tensor,
        *,
        logprobs: bool | None = None,
    ) -> dict[int, Tensor]:
        """Activations after each captured layer (layer -> BTD), with gradient to the weights.

        Args:
            boundary, ids_BT, mask_BT: of one batch.
            logprobs: whether to run up to the head, for `LOGPROBS`; None: only where nothing else
                is captured.

        Raises:
            TrainingError: a captured layer did not run.
        """
        logprobs = self.reads_only_logprobs if logprobs is None else logprobs
        captured: dict[int, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(_evaluating(self.model))
            for index in range(self.first):
                stack.enter_context(forward_as(self.structure.layers[index], self._pass_through))
            layer = self.structure.layers[self.first]
            residual_BTD = boundary.residual_BTD
            if residual_BTD is not None:

                def from_product(*_args: Any, **_kwargs: Any) -> Any:
                    return self.structure.returned(residual_BTD + self._tail(boundary.input_BTI))

                stack.enter_context(forward_as(layer, from_product))
            else:
                stack.enter_context(entered_with(layer, lambda: boundary.input_BTI))
            stack.enter_context(self._capturing(captured, logprobs))
            with stopping():
                captured |= self._model_forward(ids_BT, mask_BT, logprobs)
        return captured

    @contextmanager
    def training(self, others: Sequence[Segment] = ()) -> Iterator[dict[str, nn.Parameter]]:
        """Gradients for the trained weights only; on exit the original weights are put back.

        Args:
            others: segments of the same model whose weights are trained too.
        """
        weights = {name: p for one in (self, *others) for name, p in one.weights.items()}
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        originals = {name: p.detach().clone() for name, p in weights.items()}
        try:
            for parameter, _ in before:
                parameter.requires_grad_(False)
            for parameter in weights.values():
                parameter.requires_grad_(True)
            yield weights
        finally:
            with torch.no_grad():
                for name, parameter in weights.items():
                    parameter.copy_(originals[name])
                    parameter.grad = None
            for parameter, flag in before:
                parameter.requires_grad_(flag)

    def _model_forward(self, ids_BT: Tensor, mask_BT: Tensor, logprobs: bool) -> dict[int, Tensor]:
        """Run the model; what its head says, if that is asked for."""
        # Without padding no mask is passed: attention kernels are then free to be causal only.
        mask = None if bool(mask_BT.all()) else mask_BT.long()
        if not logprobs:
            self.structure.backbone(input_ids=ids_BT, attention_mask=mask, use_cache=False)
            return {}
        logits_BTV = self.model(input_ids=ids_BT, attention_mask=mask, use_cache=False).logits
        return {LOGPROBS: _token_logprobs(logits_BTV, ids_BT)}

    def _first_projection(self) -> nn.Module:
        return self.structure.projection_of(self.first)

    def _tail(self, input_BTI: Tensor) -> Tensor:
        """The first trained layer's product and what follows it, before the residual is added."""
        layer = self.structure.layers[self.first]
        out_BTD: Tensor = self._first_projection()(input_BTI)
        for name in self.structure.tail:
            out_BTD = layer.get_submodule(name)(out_BTD)
        return out_BTD

    def _pass_through(self, *args: Any, **kwargs: Any) -> Any:
        return self.structure.returned(entering(args, kwargs))

    @contextmanager
    def _capturing(self, into: dict[int, Tensor], logprobs: bool) -> Iterator[None]:
        """Record the captured layers' outputs; fail if one never ran.

        The model stops after the last of them, unless its head is run too.
        """

        def capture_at(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def see(_module: nn.Module, _args: Any, output: Any) -> None:
                into[index] = output[0] if isinstance(output, tuple) else output
                if index == self.last and not logprobs:
                    stop()

            return see

        with ExitStack() as stack:
            for index in self.layers_read:
                layer = self.structure.layers[index]
                stack.enter_context(hooked(layer.register_forward_hook(capture_at(index))))
            yield
        wanted = (*self.layers_read, *([LOGPROBS] if logprobs else []))
        missing = [index for index in wanted if index not in into]
        if missing:
            raise TrainingError(
                what="A capture never fired",
                got=f"no activations after layer {missing[0]}"
                if missing[0] != LOGPROBS
                else "no log-probabilities",
                allowed=f"activations after layers {self.layers_read}",
                fix="report the architecture; open the model without compilation",
            )


def _token_logprobs(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Log-probability of each token given those before it, shape BT1; 0 at the first."""
    predicted = logits_BTV[:, :-1].float().flatten(0, 1)
    nll = cross_entropy(predicted, ids_BT[:, 1:].flatten(), reduction="none")
    return pad(-nll.view(len(ids_BT), -1), (1, 0))[..., None]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout: boundaries are shared between steps, so the model must be deterministic."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
