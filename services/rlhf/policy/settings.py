"""Settings of the policy service, and of sampling, which the trainer and the rollout worker share with it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.settings import Compute, InstanceName, Listen, Section


class PolicySettings(Compute, Listen):
    model: Path | None = None
    """Folder of a causal language model with its tokenizer. None: the run's start model (run.model)."""
    join_run: bool = False
    """Register in Redis as a replica of the run and follow its current weights. Without it, no Redis is needed."""
    name: InstanceName = "policy-0"
    """Stable name of this replica; given empty: the machine's host name."""
    advertise: str = ""
    """Address under which the trainer reaches this replica; empty: host and port, where it listens on every address the
    machine's host name and port."""
    max_sequences: PositiveInt = 64
    """Sequences decoded together."""
    max_batch_tokens: PositiveInt = 16384
    """Prompt and reserved response tokens of all sequences decoded together; more wait."""
    max_prefill_tokens: PositiveInt = 4096
    """Prompt tokens admitted in one step, so that long prompts do not hold up sequences being decoded."""
    max_waiting_sequences: PositiveInt = 1024
    """Sequences that may wait for admission; more are refused with RESOURCE_EXHAUSTED and a time to try again."""
    max_prompts_per_call: PositiveInt = 256
    """Prompts in one Generate."""
    max_new_tokens: PositiveInt = 1024
    """Upper limit on a request's max_new_tokens."""
    in_flight: Literal["wait", "keep"] = "wait"
    """Sequences in flight at a commit: finish on the weights they began with, or continue on the new ones with
    recomputed caches."""
    answer_cache_s: PositiveFloat = 120.0
    """Seconds for which the answer to a request_id is kept for a repeated call."""
    weights_poll_s: PositiveFloat = 1.0
    """Seconds between looks at the run's current weights when no message says that they have changed."""
    weights_grace_s: PositiveFloat = 15.0
    """Seconds a replica may lag behind the run's current weights before it reports not ready."""


class SamplingSettings(Section):
    temperature: PositiveFloat = 1.0
    """Logits are divided by it before every softmax: in the policy, the reference and the trainer."""
    top_k: NonNegativeInt = 0
    """Sample among this many likeliest tokens; 0: all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that together have this probability."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Drop tokens with less than this share of the likeliest token's probability."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides positive and multiplies negative logits of tokens already present."""
    max_new_tokens: PositiveInt = 32
    """Response length at most."""
    min_new_tokens: NonNegativeInt = 0
    """End tokens cannot be sampled before this many."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response."""


class SampleSettings(Compute):
    """`rlhf sample`."""

    model: Path | None = None
    """Folder of a causal language model. None: the run's start model (run.model)."""
    prompts: Path | None = None
    """JSONL or Parquet of prompts. None: the run's data/prompts.jsonl."""
    heldout_prompts: Path | None = None
    """The same, to check the reward model with. None: the run's data/heldout_prompts.jsonl."""
    out: Path | None = None
    """JSONL to write. None: the run's samples.jsonl."""
    completions: PositiveInt = 4
    """Completions per prompt."""
    limit: NonNegativeInt = 0
    """Take this many prompts from the start of the file; 0: all."""
    heldout_limit: NonNegativeInt = 0
    """Complete this many held-out prompts too, into the run's heldout_samples.jsonl; 0: none."""
    seed: NonNegativeInt = 0
    """Seed of the first completion; every other one has its own, counted on from it."""
