"""TF-IDF and logistic regression (scikit-learn), fitted on labelled texts: works offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expunge.data.text import Labelled
from expunge.evaluation.scorers.base import check_classes, judged


@dataclass(frozen=True)
class TfidfScorer:
    """Probability of the toxic class by words and parts of words; made by `fit`.

    Attributes:
        pipeline: a fitted scikit-learn pipeline. It is never stored: fitting again is exact.
    """

    pipeline: Any
    name: str = "tfidf"
    about: str = "TF-IDF and logistic regression"

    @classmethod
    def fit(
        cls,
        labelled: Sequence[Labelled],
        *,
        name: str = "tfidf",
        source: str = "the run's own training texts",
    ) -> TfidfScorer:
        """Fit on texts of both classes, weighted so that each class counts alike.

        Features are one and two words, and 2 to 5 characters within words (which see misspelt
        insults). Raises DataError if a class is missing.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline, make_union

        toxic, neutral = check_classes(labelled, name)
        # \w+ instead of the default, which drops words of one letter and may leave none at all.
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")
        parts = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
        # liblinear: exact within a tolerance, the same each time, and quick on sparse features.
        regression = LogisticRegression(
            class_weight="balanced", solver="liblinear", max_iter=1000, random_state=0
        )
        pipeline = make_pipeline(make_union(words, parts), regression)
        pipeline.fit([*toxic, *neutral], [1] * len(toxic) + [0] * len(neutral))
        about = f"TF-IDF and logistic regression fitted on {source}"
        return cls(pipeline, name, f"{about} ({len(toxic)} toxic, {len(neutral)} neutral)")

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """Probability of the toxic class; None for a blank text."""
        return judged(texts, lambda given: self.pipeline.predict_proba(given)[:, 1].tolist())
