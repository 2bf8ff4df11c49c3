"""One completion being generated: what it has so far, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlhf.policy.engine import Finished, GenerationRequest, TokenSampled
from rlhf.wire.records import FinishReason, LogprobMode, Tokens, VersionSpan, WeightVersion

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, without special tokens."""

_LONGEST_CHARACTER = 8


class Generation:
    """Tokens and log-probs so far. `accept` is called once per token and has to be cheap."""

    def __init__(self, request: GenerationRequest, decode: Decode, eos_token_ids: frozenset[int], context: int) -> None:
        self.request = request
        self.response: list[int] = []
        self.max_new_tokens = min(request.stopping.max_new_tokens, context - len(request.prompt))
        self.end_token_ids = _end_tokens(request, eos_token_ids)
        self._eos_token_ids = eos_token_ids
        self._logprobs: list[float] = []
        self._began: list[tuple[WeightVersion, int]] = []
        self._decode = decode
        self._text = _Text(decode) if request.stream or request.stopping.stop_strings else None
        self._finish: tuple[FinishReason, str, str | None] | None = None

    @property
    def reserved_tokens(self) -> int:
        """Room that it may come to need in the cache."""
        return len(self.request.prompt) + self.max_new_tokens

    @property
    def tokens(self) -> Tokens:
        """Prompt and response so far."""
        return np.concatenate([self.request.prompt, np.array(self.response, dtype=np.int32)])

    def begin(self, version: WeightVersion) -> None:
        """From the next token on these are the weights behind it."""
        if self._began and self._began[-1][1] == len(self.response):
            self._began.pop()
        self._began.append((version, len(self.response)))

    def accept(self, token_id: int, logprob: float) -> bool:
        """Takes the next token; True if it is the last."""
        self.response.append(token_id)
        self._logprobs.append(logprob)
        if self._text is not None:
            self._text.add(token_id)
        if token_id in self.end_token_ids:
            self._finish = self._ended_by(token_id)
        elif self.request.stopping.stop_strings and (stop := self._stop_string()) is not None:
            self._finish = stop
        elif len(self.response) >= self.max_new_tokens:
            self._finish = (FinishReason.LENGTH, "", None)
        return self._finish is not None

    def last(self) -> TokenSampled:
        """The event of the token just accepted, of a request that streams."""
        assert self._text is not None
        wants_logprob = self.request.logprob_mode is not LogprobMode.NONE
        logprob = self._logprobs[-1] if wants_logprob else None
        return TokenSampled(self.request.id, self.response[-1], logprob, self._text.added)

    def finished(self) -> Finished:
        """The event of the end."""
        assert self._finish is not None
        reason, stopped_by, text = self._finish
        wants_logprobs = self.request.logprob_mode is not LogprobMode.NONE
        return Finished(
            id=self.request.id,
            token_ids=np.array(self.response, dtype=np.int32),
            logprobs=np.array(self._logprobs, dtype=np.float32) if wants_logprobs else None,
            text=self._decode(self.response) if text is None else text,
            finish_reason=reason,
            stopped_by=stopped_by,
            versions=self._spans(),
        )

    def _ended_by(self, token_id: int) -> tuple[FinishReason, str, str | None]:
        if token_id in self._eos_token_ids and not self.request.stopping.ignore_eos:
            return FinishReason.EOS, "", None
        return FinishReason.STOP_TOKEN, str(token_id), None

    def _stop_string(self) -> tuple[FinishReason, str, str | None] | None:
        """The first stop string in the text, which is cut before it."""
        assert self._text is not None
        if not self._text.added or len(self.response) < self.request.stopping.min_new_tokens:
            return None
        text, old = self._text.text, len(self._text.text) - len(self._text.added)
        # One that ended in older text came before `min_new_tokens` and does not count.
        places = [(text.find(stop, max(0, old + 1 - len(stop))), stop) for stop in self.request.stopping.stop_strings]
        found = [place for place in places if place[0] >= 0]
        if not found:
            return None
        at, stop = min(found, key=lambda place: place[0])
        return FinishReason.STOP_STRING, stop, text[:at]

    def _spans(self) -> tuple[VersionSpan, ...]:
        ends = [*(start for _, start in self._began[1:]), len(self.response)]
        return tuple(VersionSpan(version, start, end) for (version, start), end in zip(self._began, ends, strict=True))


class _Text:
    """Text that grows with each token. Decodes a window of the last few tokens only.

    What a token adds depends on its neighbours (spaces, characters of several bytes), so it is the difference between
    the window's text with and without it, once that ends in a whole character.
    """

    def __init__(self, decode: Decode) -> None:
        self.text = ""
        self.added = ""
        self._decode = decode
        self._window: list[int] = []
        self._known = 0
        """Tokens of the window whose text is in `text`."""

    def add(self, token_id: int) -> None:
        self._window.append(token_id)
        before, now = self._decode(self._window[: self._known]), self._decode(self._window)
        unknown = len(self._window) - self._known
        if now.endswith("\N{REPLACEMENT CHARACTER}") and unknown < _LONGEST_CHARACTER:
            self.added = ""
            return
        self.added = now[len(before) :]
        self.text += self.added
        self._window = self._window[self._known :]
        self._known = len(self._window)


def _end_tokens(request: GenerationRequest, eos_token_ids: frozenset[int]) -> frozenset[int]:
    stops = frozenset(request.stopping.stop_token_ids)
    return stops if request.stopping.ignore_eos else stops | eos_token_ids
