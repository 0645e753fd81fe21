"""Google's Perspective API (https://developers.perspectiveapi.com): texts leave this machine.

Used only where it is named. The key comes from ``PERSPECTIVE_API_KEY`` and travels in a header,
so that it stands in no address and no message. Its model changes without notice, so scores of
different days may differ.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from expunge.errors import ModelError, RecipeError
from expunge.evaluation.scorers.base import judged

URL = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
KEY = "PERSPECTIVE_API_KEY"
INTERVAL = 1.0  # seconds between two requests: the default quota
TRIES = 5
LATER = {0, 429, 500, 502, 503, 504}  # worth another try; 0: no answer at all
# What the service calls a text it cannot judge; such a text is unscored.
UNSUITED = {"COMMENT_EMPTY", "COMMENT_TOO_LONG", "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"}

Transport = Callable[[str, bytes, Mapping[str, str]], tuple[int, bytes]]
"""(address, body, headers) -> (HTTP status, body); status 0 with a reason: no connection."""


def over_https(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """POST by the standard library, with a limit of 30 seconds."""
    request = urllib.request.Request(url, data=body, headers=dict(headers), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except (OSError, http.client.HTTPException) as error:
        return 0, type(error).__name__.encode()


class Perspective:
    """The TOXICITY attribute of English texts, one request a second at most.

    Args:
        key: None: from the environment.
        transport, clock, sleep: replaced in tests.

    Raises:
        RecipeError: there is no key.
    """

    name = "perspective"
    about = "Perspective API, TOXICITY, English; Google's model of the day"

    def __init__(
        self,
        key: str | None = None,
        *,
        name: str = "perspective",
        transport: Transport = over_https,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        key = key or os.environ.get(KEY)
        if not key:
            raise RecipeError(
                what="The scorer perspective needs an API key",
                got=f"no {KEY} in the environment",
                allowed="a key from Google Cloud with the Perspective Comment Analyzer API enabled",
                fix=f"export {KEY}=…, or use an offline scorer (tfidf:FILE, words, hf:DIR)",
            )
        self.name = name
        self._headers = {"Content-Type": "application/json", "X-Goog-Api-Key": key}
        self._transport, self._clock, self._sleep = transport, clock, sleep
        self._next = float("-inf")  # when the next request may start

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """TOXICITY of each text; None for a blank one and for one the service cannot judge.

        Raises ModelError if the service refuses, or does not answer after five tries.
        """
        return judged(texts, lambda given: [self._judge(text) for text in given])

    def _judge(self, text: str) -> float | None:
        body = {
            "comment": {"text": text, "type": "PLAIN_TEXT"},
            "languages": ["en"],
            "requestedAttributes": {"TOXICITY": {}},
            "doNotStore": True,
        }
        status, answer = self._send(json.dumps(body).encode())
        try:
            if status == 200:
                value = json.loads(answer)["attributeScores"]["TOXICITY"]["summaryScore"]["value"]
                return float(value)
            if status == 400 and _error_types(json.loads(answer)) & UNSUITED:
                return None
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # no answer of the kind documented: told below
        raise ModelError(
            what="The Perspective API gave no score",
            got=f"HTTP status {status}" if status else f"no connection: {answer.decode()}",
            allowed="status 200 with a TOXICITY score",
            fix="check the key, its quota and the network, or leave this scorer out",
        )

    def _send(self, body: bytes) -> tuple[int, bytes]:
        """The answer to one request; twice the pause after each failure that may pass."""
        for attempt in range(TRIES):
            self._sleep(max(0.0, self._next - self._clock()))
            self._next = self._clock() + INTERVAL * 2**attempt
            status, answer = self._transport(URL, body, self._headers)
            if status not in LATER:
                break
        self._next = min(self._next, self._clock() + INTERVAL)
        return status, answer


def _error_types(answer: Any) -> set[str]:
    """The service's own names for what was wrong."""
    details = answer["error"].get("details", [])
    return {str(detail.get("errorType")) for detail in details}
