"""The state of an unfinished run: saved every few steps, enough to go on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expunge.errors import TrainingError
from expunge.model.shards import save_tensors


@dataclass(frozen=True)
class TrainingState:
    """A run after ``step`` optimiser steps.

    Attributes:
        step: steps done.
        weights: trained weights, name -> tensor, in the model's dtype.
        optimiser: AdamW's tensors, ``<name>/<key>`` -> tensor, master weights included.
        first_norm: layer -> mean norm over the first forget batch.
        micro_batch_size: texts that went through the segment together; 0: the whole batch.
        context: fingerprint of everything the run depends on: settings, data, base weights.
        best: weights of the best state that looks at validation found; empty without looks.
        beside: ``first_norm`` and ``micro_batch_size`` of each trainer beside the first.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]
    first_norm: Mapping[int, float]
    micro_batch_size: int
    context: str = ""
    best: Mapping[str, Tensor] = field(default_factory=dict)
    beside: Sequence[tuple[Mapping[int, float], int]] = ()

    def save(self, path: Path) -> None:
        """Write the state as safetensors, atomically."""
        tensors = {f"weights/{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {f"optimiser/{name}": tensor for name, tensor in self.optimiser.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        facts = {
            "step": self.step,
            "first_norm": _norms(self.first_norm, str),
            "micro_batch_size": self.micro_batch_size,
            "context": self.context,
            "beside": [[_norms(norms, str), micro] for norms, micro in self.beside],
        }
        contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_tensors(path, contiguous, {"state": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> TrainingState:
        """Read a state. Raises TrainingError if the file is no state."""
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(
                step=int(facts["step"]),
                weights=_under(tensors, "weights/"),
                optimiser=_under(tensors, "optimiser/"),
                first_norm=_norms(facts["first_norm"], int),
                micro_batch_size=int(facts["micro_batch_size"]),
                context=str(facts["context"]),
                best=_under(tensors, "best/"),
                beside=[
                    (_norms(norms, int), int(micro)) for norms, micro in facts.get("beside", ())
                ],
            )
        except (SafetensorError, AttributeError, OSError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                what=f"The saved state {path.name} of this run cannot be read",
                got=f"{type(error).__name__}: {error}",
                allowed="the file that an interrupted run left behind",
                fix="start again with --fresh",
            ) from error


def _norms(norms: Mapping[Any, float], key: type[Any]) -> dict[Any, float]:
    """Layer -> norm with the layers as JSON has them, text, or as numbers."""
    return {key(layer): norm for layer, norm in norms.items()}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Optimiser:
    """AdamW over named weights, with float32 master copies where the weights are narrower.

    An update of a bfloat16 weight is often smaller than the distance to the next bfloat16, so
    without a master copy it would be lost.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.nn.Parameter],
        *,
        weight_decay: float,
        master: bool,
    ) -> None:
        self.weights = weights
        self.masters = {
            name: p.detach().float().clone() if master and p.dtype != torch.float32 else p
            for name, p in weights.items()
        }
        self._adamw = torch.optim.AdamW(
            list(self.masters.values()), lr=0.0, weight_decay=weight_decay
        )
        self.steps: int | None = 0  # done; None inside an update, and after one that failed

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.weights.values():
            parameter.grad = None

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients together."""
        squares = [
            p.grad.float().square().sum() for p in self.weights.values() if p.grad is not None
        ]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One AdamW step; weights are the masters rounded to the model's dtype."""
        self._adamw.param_groups[0]["lr"] = lr
        before, self.steps = self.steps, None
        for name, master in self.masters.items():
            weight = self.weights[name]
            if master is not weight:
                master.grad = None if weight.grad is None else weight.grad.float()
        self._adamw.step()
        for name, master in self.masters.items():
            if master is not self.weights[name]:
                self.weights[name].copy_(master)
        self.steps = None if before is None else before + 1

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save: moments, step counts, masters."""
        found = {}
        for name, master in self.masters.items():
            for key, value in self._adamw.state.get(master, {}).items():
                found[f"{name}/{key}"] = torch.as_tensor(value)
            if master is not self.weights[name]:
                found[f"{name}/master"] = master
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], *, steps: int) -> None:
        """Inverse of `tensors`, after ``steps`` steps."""
        self.steps = steps
        for name, master in self.masters.items():
            own = _under(tensors, f"{name}/")
            saved_master = own.pop("master", None)
            if saved_master is not None:
                master.copy_(saved_master)
            # AdamW keeps its step count on the CPU and its moments beside the weight.
            self._adamw.state[master] = {
                key: value.clone() if key == "step" else value.to(master.device).clone()
                for key, value in own.items()
            }
