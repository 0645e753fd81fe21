"""Likelihood objectives: make the forget texts less likely than they were.

π is the model, π0 the original; log π(x) is the sum over the tokens of a text that count, in nats.
Forget terms are means over texts. The retain term is the nats/token of retain texts. Shapes: B
batch, T tokens.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from expunge.errors import DataError, RecipeError
from expunge.masked import masked_mean
from expunge.objectives.base import Captured, Knob, Logprobs, Loss, objective


@objective(
    "npo",
    source="arXiv:2404.05868 v2",
    deviations="only MLP output projections are trained; the rate decays linearly to zero; the "
    "retain term is the nats/token of retain texts (the paper's NPO+RT)",
    needs=Logprobs(),
    retain_weight=1.0,
    knobs=(Knob("beta", 0.01, 2.0),),
)
def npo(forget: Captured, retain: Captured, *, beta: float = 0.1) -> Loss:
    """Negative preference optimisation: −(2/β) log σ(−β log(π/π0)) on forget texts.

    At the first step it is (2/β) log 2 with the gradient of gradient ascent; it flattens as a text
    becomes less likely, so it does not diverge as ascent does.

    Args:
        forget: log-probabilities of forget texts, with the original's.
        retain: log-probabilities of retain texts.
        beta: how early the loss flattens, per nat; above 0.
    """
    _check(beta, usual=0.1)
    ratio_B = log_ratio(forget)
    loss = (-2 / beta * logsigmoid(-beta * ratio_B)).mean()
    return Loss(loss, nats_per_token(retain), partial(_watch, forget, retain))


@objective(
    "graddiff",
    source="arXiv:2401.06121 (TOFU), which has it from arXiv:2203.12817 (Liu et al. 2022)",
    deviations="only MLP output projections are trained; the rate decays linearly to zero; all of "
    "a text counts, where TOFU counts the answer alone; forget texts count alike whatever their "
    "length, where public code takes the mean over all tokens of a batch",
    needs=Logprobs(forget_reference=False),
    retain_weight=1.0,
)
def graddiff(forget: Captured, retain: Captured) -> Loss:
    """Gradient difference: the mean over forget texts of their nats/token, negated.

    Nats/token of each text, so that a step is of one size for long and short texts; then the mean
    over texts, as in TOFU's formula. The term is unbounded below: nothing but the retain term, the
    decay of the rate and the guard against collapse ends the ascent.

    Args:
        forget: log-probabilities of forget texts.
        retain: log-probabilities of retain texts, with the original's to watch.
    """
    loss = -_nats_of_texts(forget).mean()
    return Loss(loss, nats_per_token(retain), partial(_watch, forget, retain))


@objective(
    "simnpo",
    source="arXiv:2410.07163 v2; repository OPTML-Group/Unlearn-Simple",
    deviations="only MLP output projections are trained; the rate decays linearly to zero; all of "
    "a text counts, where TOFU counts the answer alone; gamma stands beside beta as in the paper's "
    "formula, where the repository multiplies the two",
    needs=Logprobs(forget_reference=False),
    retain_weight=1.0,
    knobs=(Knob("beta", 0.1, 10.0),),
)
def simnpo(forget: Captured, retain: Captured, *, beta: float = 2.5, gamma: float = 0.0) -> Loss:
    """Simple NPO: −(2/β) log σ(−(β/|x|) log π(x) − γ) on forget texts, |x| the tokens that count.

    Unlike NPO it divides by a text's length and asks for no original model: it flattens where a
    text has become unlikely, not where it has become less likely than it was, so a text that was
    unlikely from the start is pushed less.

    Args:
        forget: log-probabilities of forget texts.
        retain: log-probabilities of retain texts, with the original's to watch.
        beta: how early the loss flattens, per nat/token; above 0. The paper: 2.5 for TOFU, 5.5 for
            WMDP. A text of n nats/token is pushed by σ(γ − β·n): choose β against the base's n.
        gamma: margin: the loss flattens γ/β nats/token later. The paper: 0.
    """
    _check(beta, usual=2.5)
    loss = (-2 / beta * logsigmoid(beta * _nats_of_texts(forget) - gamma)).mean()
    return Loss(loss, nats_per_token(retain), partial(_watch, forget, retain))


@objective(
    "dpo",
    source="arXiv:2305.18290 v3; for toxicity arXiv:2401.01967",
    deviations="only MLP output projections are trained; the rate decays linearly to zero; a "
    "retain term, the nats/token of retain texts, is weighed in (0 is the source's); of knowledge "
    "the chosen texts are refusals",
    needs=Logprobs(twin=True),
    retain_weight=1.0,
    knobs=(Knob("beta", 0.01, 2.0),),
)
def dpo(forget: Captured, retain: Captured, *, beta: float = 0.1) -> Loss:
    """Direct preference optimisation: −log σ(β·[log(π/π0)(chosen) − log(π/π0)(rejected)]).

    The forget text is the rejected one, its other wording the chosen one: a neutral one of toxic
    text, a refusal in place of knowledge.

    Args:
        forget: log-probabilities of rejected texts, with the original's and the chosen twins.
        retain: log-probabilities of retain texts.
        beta: strength of the tie to the original model; above 0.

    Raises:
        DataError: the forget texts have no other wording.
    """
    _check(beta, usual=0.1)
    if forget.twin is None:
        raise DataError(
            what="The objective dpo needs pairs",
            got="forget texts without another wording",
            allowed="another wording of each forget text",
            fix="give --pairs, for knowledge --set refusals=FILE, or use npo",
        )
    margin_B = log_ratio(forget.twin) - log_ratio(forget)
    loss = -logsigmoid(beta * margin_B).mean()
    return Loss(loss, nats_per_token(retain), partial(_watch, forget, retain))


def _check(beta: float, *, usual: float) -> None:
    if not beta > 0:
        raise RecipeError(
            what="beta of a likelihood objective is out of range",
            got=repr(beta),
            allowed="a number above 0, in 1/nat",
            fix=f"set objective_settings.beta={usual}",
        )


def log_ratio(texts: Captured) -> Tensor:
    """log π(x) − log π0(x) of each text, in nats, shape B, float32.

    Raises:
        DataError: no token of a text counts; a sum over nothing is missing, not zero.
    """
    assert texts.logprobs_BT is not None and texts.reference_logprobs_BT is not None
    _counts(texts.mask_BT)
    ratio_B: Tensor = (texts.logprobs_BT.float() - texts.reference_logprobs_BT.float()).sum(-1)
    return ratio_B


def _nats_of_texts(texts: Captured) -> Tensor:
    """Nats/token of each text, shape B, float32.

    Raises:
        DataError: no token of a text counts.
    """
    assert texts.logprobs_BT is not None
    nats_B: Tensor = -texts.logprobs_BT.float().sum(-1) / _counts(texts.mask_BT)
    return nats_B


def nats_per_token(texts: Captured) -> Tensor:
    """Mean over tokens of −log π."""
    assert texts.logprobs_BT is not None
    return masked_mean(-texts.logprobs_BT, texts.mask_BT)


def _counts(mask_BT: Tensor) -> Tensor:
    """Tokens that count, of each text, shape B."""
    counts_B = mask_BT.sum(-1)
    if not bool(counts_B.all()) or not len(counts_B):
        raise DataError(
            what="A text holds no token that counts",
            got=f"a mask of shape {tuple(mask_BT.shape)} with {int((counts_B == 0).sum())} empty "
            "rows",
            allowed="at least one token of each text besides padding and the first",
            fix="drop empty texts, and texts of a single token",
        )
    return counts_B


@torch.no_grad()
def _watch(forget: Captured, retain: Captured) -> dict[str, Tensor]:
    """Nats/token on forget texts, as the mean of texts, and by how much those of retain texts rose.

    Texts count alike, as in the forget term, so that a batch computed in pieces shows the same.
    """
    assert retain.reference_logprobs_BT is not None and retain.logprobs_BT is not None
    rise_BT = retain.reference_logprobs_BT - retain.logprobs_BT
    return {
        "nll_forget": _nats_of_texts(forget).mean(),
        "rise_retain": masked_mean(rise_BT, retain.mask_BT),
    }
