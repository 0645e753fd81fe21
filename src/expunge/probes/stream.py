"""Activations of many texts, a group at a time: one forward pass, nothing kept.

Whoever reads the stream takes sums or a few rows from each group and lets go of it, so memory does
not grow with the texts. Texts go in groups of similar length, padded on the right.

Shapes: B texts of a group, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from expunge.errors import DataError, ModelError, RecipeError, ResourceError
from expunge.model.boundaries import GROUP_TOKENS, length_groups
from expunge.model.hooks import stop, stopping
from expunge.model.memory import is_out_of_memory
from expunge.model.structure import Structure

SHORTEST = 2  # the first token does not count, so a text needs another


@dataclass(frozen=True)
class Pass:
    """What one group of texts gave.

    Attributes:
        indices: which texts, as places in the sequence given to `stream`; one for each row.
        acts: layer -> its output BTD (the residual stream), on the model's device, in its dtype.
        mask_BT: true where a token counts: neither padding nor the first of its text.
    """

    indices: tuple[int, ...]
    acts: dict[int, Tensor]
    mask_BT: Tensor


def stream(
    model: nn.Module,
    structure: Structure,
    texts: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Pass]:
    """Run the texts through the model once, without gradient, up to the deepest layer asked for.

    The first token of a text is masked: in many models it is an attention sink, with a norm that
    would outweigh all others. Each text comes exactly once, shorter ones first. Dropout is off.
    Groups that do not fit in memory are halved.

    Args:
        model: the model that ``structure`` was found in; with or without head.
        structure: where its decoder layers are.
        texts: token ids of each text, unpadded, at least two.
        layers: 0-based decoder layers whose output is wanted.
        on_progress: called with the number of texts just done.

    Raises:
        RecipeError: a layer is out of range, or none is given.
        DataError: a text has fewer than two tokens.
        ModelError: a layer never ran.
        ResourceError: a single text does not fit in memory.
    """
    wanted = tuple(sorted(set(layers)))
    _check(structure, texts, wanted)
    return _passes(model, structure, texts, wanted, on_progress)


def _check(structure: Structure, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> None:
    wrong = [layer for layer in layers if not 0 <= layer < structure.n_layers]
    if wrong or not layers:
        raise RecipeError(
            what="A layer is out of range",
            got=f"layer {wrong[0]}" if wrong else "no layer",
            allowed=f"0 to {structure.n_layers - 1}",
            fix="choose layers within the range",
        )
    short = next((i for i, ids in enumerate(texts) if len(ids) < SHORTEST), None)
    if short is not None:
        raise DataError(
            what="A text is too short to have activations that count",
            got=f"text {short} with {len(texts[short])} tokens; the first token never counts",
            allowed=f"at least {SHORTEST} tokens",
            fix="leave out empty texts and texts of a single token",
        )


def _passes(
    model: nn.Module,
    structure: Structure,
    texts: Sequence[Sequence[int]],
    layers: tuple[int, ...],
    on_progress: Callable[[int], None] | None,
) -> Iterator[Pass]:
    device = next(structure.backbone.parameters()).device
    budget = GROUP_TOKENS.get(device.type, GROUP_TOKENS["cuda"])
    fitting = 0  # tokens that fitted where more did not; 0: all fitted
    for group in length_groups([len(ids) for ids in texts], budget):
        width, low = len(texts[group[-1]]), 0
        size = max(1, min(len(group), fitting // width)) if fitting else len(group)
        while low < len(group):
            indices = tuple(group[low : low + size])
            try:
                done = _forward(model, structure, [texts[i] for i in indices], layers, device)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(indices) == 1:
                    raise _too_large(error) from error
                size = len(indices) // 2
                fitting = size * width
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            yield Pass(indices, *done)
            del done  # or this group would still be held while the next is computed
            low += len(indices)
            if on_progress is not None:
                on_progress(len(indices))


@torch.no_grad()
def _forward(
    model: nn.Module,
    structure: Structure,
    texts: Sequence[Sequence[int]],
    layers: tuple[int, ...],
    device: torch.device,
) -> tuple[dict[int, Tensor], Tensor]:
    """The layers' outputs for one padded batch, and the mask of the tokens that count."""
    ids_BT = pad_sequence([torch.tensor(list(ids)) for ids in texts], batch_first=True)
    places_T = torch.arange(ids_BT.shape[1])
    real_BT = places_T < torch.tensor([len(ids) for ids in texts])[:, None]
    # Without padding no mask is passed: attention kernels are then free to be causal only.
    mask = None if bool(real_BT.all()) else real_BT.long().to(device)
    acts: dict[int, Tensor] = {}

    def capture_at(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def see(_module: nn.Module, _args: Any, output: Any) -> None:
            acts[layer] = output[0] if isinstance(output, tuple) else output
            if layer == layers[-1]:
                stop()

        return see

    training = model.training
    with ExitStack() as undo:
        undo.callback(model.train, training)
        model.eval()
        for layer in layers:
            handle = structure.layers[layer].register_forward_hook(capture_at(layer))
            undo.callback(handle.remove)
        with stopping():
            structure.backbone(input_ids=ids_BT.to(device), attention_mask=mask, use_cache=False)
    missing = [layer for layer in layers if layer not in acts]
    if missing:
        raise ModelError(
            what="A capture never fired",
            got=f"no activations after layer {missing[0]}",
            allowed=f"activations after layers {layers}",
            fix="report the architecture; open the model without compilation",
        )
    return acts, (real_BT & (places_T > 0)).to(device)


def _too_large(error: BaseException) -> ResourceError:
    return ResourceError(
        what="Out of memory in reading activations, with a single text",
        got=str(error).splitlines()[0] if str(error) else type(error).__name__,
        allowed="a text that fits",
        fix="lower max_tokens, use dtype bfloat16, or a machine with more memory",
    )
