"""The section `[sampling]` as the records that calls and files carry."""

from __future__ import annotations

from rlhf.policy.settings import SamplingSettings
from rlhf.wire.records import Sampling, Stopping


def sampling_of(settings: SamplingSettings, completions: int = 1, seed: int | None = None) -> tuple[Sampling, Stopping]:
    """
    Args:
        completions: of each prompt.
        seed: of the first completion. None: the policy draws one for every prompt.
    """
    sampling = Sampling(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        seed=seed,
        completions=completions,
    )
    stopping = Stopping(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        stop_strings=settings.stop_strings,
    )
    return sampling, stopping
