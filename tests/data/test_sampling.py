from __future__ import annotations

from rlhf.data.sampling import sampling_of
from rlhf.policy.settings import SamplingSettings
from rlhf.wire.records import Sampling, Stopping


def test_every_number_of_the_section_is_carried_over() -> None:
    settings = SamplingSettings(
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        max_new_tokens=7,
        min_new_tokens=2,
        stop_strings=("x",),
    )
    sampling = Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=4, completions=6)
    stopping = Stopping(max_new_tokens=7, min_new_tokens=2, stop_strings=("x",))
    assert sampling_of(settings, 6, 4) == (sampling, stopping)
    assert len(SamplingSettings.model_fields) == 8, "a new one wants to be carried over too"


def test_without_a_seed_the_policy_draws_one() -> None:
    assert sampling_of(SamplingSettings())[0].seed is None
