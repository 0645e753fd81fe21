"""Any Hugging Face text classifier, with its toxic label looked up, never assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expunge.errors import DataError, ModelError
from expunge.evaluation.scorers.base import judged
from expunge.files import local_path
from expunge.model.checkpoint import quiet
from expunge.model.memory import halving_rows

# The first set that a model has labels of is taken: where ``toxic`` stands beside finer kinds
# (Jigsaw), it covers them; ``hate`` and ``offensive`` as rival classes are both toxic.
TOXIC = ({"toxic", "toxicity"}, {"hate", "hateful", "hatespeech", "offensive", "abusive"})
# Kinds of Jigsaw's that overlap: labels like these are no rival classes.
OVERLAPPING = {"severetoxic", "severetoxicity", "obscene", "threat", "insult", "identityhate"}
LONGEST = 512  # tokens of a text that are read, at most
BATCH = 32


@dataclass(frozen=True)
class Classifier:
    """A sequence-classification model; made by `load`.

    Attributes:
        labels: indices of the toxic outputs.
        sigmoid: whether outputs are judged one by one (their highest counts) or compete (their
            probabilities are added).
    """

    model: Any
    tokenizer: Any
    labels: tuple[int, ...]
    sigmoid: bool
    name: str
    about: str

    @classmethod
    def load(
        cls,
        source: str,
        *,
        label: str | None = None,
        name: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Classifier:
        """Open a directory, or a model named on the hub; safetensors only, no code of its own.

        Args:
            label: the toxic label as the model's config calls it; None: a known name is looked
                for there.

        Raises:
            DataError: the config does not tell which output means toxic, or how to read it.
            ModelError: there is no such model, or it lacks a head or safetensors.
        """
        config, tokenizer, model = _open(source, device)
        labels = toxic_labels(config.id2label, source, label)
        chosen = " + ".join(config.id2label[at] for at in labels)
        short = local_path(source).name
        return cls(
            model=model,
            tokenizer=tokenizer,
            labels=labels,
            sigmoid=_is_sigmoid(config, source),
            name=name or f"hf:{short}",
            about=f"the classifier {short} ({config.model_type}), label {chosen}",
        )

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """Probability of the toxic labels; None for a blank text. Long texts are cut."""
        return judged(texts, self._judge)

    def _judge(self, texts: list[str]) -> list[float]:
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        scores = [0.0] * len(texts)

        def work(low: int, high: int) -> None:
            batch = order[low:high]
            for at, score in zip(batch, self._batch([texts[at] for at in batch]), strict=True):
                scores[at] = score

        # Without a padding token, texts of unequal length cannot go together.
        size = BATCH if self.tokenizer.pad_token is not None else 1
        halving_rows(len(order), work, what=f"the scorer {self.name}", size=size)
        return scores

    @torch.inference_mode()
    def _batch(self, texts: list[str]) -> list[float]:
        inputs = self.tokenizer(
            texts,
            return_tensors="pt",
            padding=len(texts) > 1,
            truncation=True,
            max_length=_longest(self.tokenizer, self.model.config),
        ).to(self.model.device)
        logits_BL = self.model(**inputs).logits.float()
        toxic = list(self.labels)
        if self.sigmoid:
            return [float(one) for one in logits_BL.sigmoid()[:, toxic].amax(1)]
        return [min(1.0, float(one)) for one in logits_BL.softmax(-1)[:, toxic].sum(1)]


def toxic_labels(
    id2label: Mapping[int, str], source: str, label: str | None = None
) -> tuple[int, ...]:
    """Indices of the toxic labels by name: ``label``, else the first known kind.

    Raises DataError where none fits; names such as LABEL_1 say nothing by themselves.
    """
    named = {at: _plain(text) for at, text in id2label.items()}
    for wanted in [{_plain(label)}] if label is not None else TOXIC:
        found = tuple(at for at, text in sorted(named.items()) if text in wanted)
        if found:
            return found
    labels = ", ".join(str(id2label[at]) for at in sorted(id2label))
    known = ", ".join(sorted(set().union(*TOXIC)))
    raise DataError(
        what=f"The labels of the classifier {source} do not say which one means toxic",
        got=f"{labels}" + (f", and no {label!r} among them" if label is not None else ""),
        allowed=f"one of {known}; or a label named by you",
        fix=f"look up what its labels mean, then name one: hf:{source}#label=NAME",
    )


def _plain(label: str) -> str:
    """Lower case without spaces, hyphens, underscores: ``Hate-Speech`` and ``hate_speech``."""
    return "".join(character for character in label.casefold() if character not in " -_")


def _is_sigmoid(config: Any, source: str) -> bool:
    """Whether each output is a yes or no of its own. DataError where the config leaves it open."""
    labels = {_plain(text) for text in config.id2label.values()}
    kind = config.problem_type
    if kind == "multi_label_classification" or (kind is None and len(labels) == 1):
        return True
    if kind == "regression" or (kind is None and labels & OVERLAPPING):
        raise DataError(
            what=f"The config of the classifier {source} does not say how to read its outputs",
            got=f"problem_type {kind}, labels {', '.join(config.id2label.values())}",
            allowed="problem_type multi_label_classification or single_label_classification",
            fix="set problem_type in a local copy of its config.json, as it was trained",
        )
    return False


def _longest(tokenizer: Any, config: Any) -> int:
    # RoBERTa's first two positions are never used.
    positions: int = getattr(config, "max_position_embeddings", None) or LONGEST + 2
    return min(LONGEST, int(tokenizer.model_max_length), max(positions - 2, 1))


def _open(source: str, device: torch.device | str) -> tuple[Any, Any, Any]:
    from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    path = local_path(source)
    where = str(path if path.is_dir() else source)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(where, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                where,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        # transformers fills them with random numbers.
        if report["missing_keys"]:
            raise ValueError(f"no weights for {', '.join(sorted(report['missing_keys'])[:5])}")
    # Missing files, bad JSON, unknown types, shapes that do not fit, no network.
    except (
        *(OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError),
        *(AttributeError, HfHubHTTPError, StrictDataclassError),
    ) as error:
        raise ModelError(
            what=f"The classifier {source} cannot be opened",
            got=f"{type(error).__name__}: {str(error)[:300]}",
            allowed="a directory or hub name with config.json, tokenizer and safetensors weights "
            "of a text classifier with its head",
            fix="check the name; save an older checkpoint again with save_pretrained",
        ) from error
    return config, tokenizer, model.to(device).eval()
