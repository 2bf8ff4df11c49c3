"""Rollouts made in the test's own process: what the services would have answered, without services."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.wire.records import (
    FinishReason,
    Rollout,
    Sampling,
    ScoredCompletion,
    VersionSpan,
    WeightVersion,
)

VERSION = WeightVersion("run-1", 0, 0, "0" * 64)


def version(step: int, epoch: int = 0, run_id: str = "run-1") -> WeightVersion:
    return WeightVersion(run_id, epoch, step, "0" * 64)


def scored(
    token_ids: Sequence[int],
    prompt_tokens: int,
    *,
    score: float = 0.0,
    logprobs: Sequence[float] | None = None,
    ref_logprobs: Sequence[float] | None = None,
    finish_reason: FinishReason = FinishReason.EOS,
    weights: WeightVersion = VERSION,
) -> ScoredCompletion:
    """A completion whose response is all that follows the prompt; log-probs are of the response, -1 if not given."""
    response = len(token_ids) - prompt_tokens

    def padded(values: Sequence[float] | None) -> np.ndarray:
        given = [-1.0] * response if values is None else list(values)
        return np.array([np.nan] * prompt_tokens + given, dtype=np.float32)

    return ScoredCompletion(
        token_ids=np.array(token_ids, dtype=np.int32),
        response_mask=np.arange(len(token_ids)) >= prompt_tokens,
        logprobs=padded(logprobs),
        ref_logprobs=padded(ref_logprobs),
        score=score,
        member_scores=np.array([score], dtype=np.float32),
        token_rewards=None,
        versions=(VersionSpan(weights, 0, response),),
        finish_reason=finish_reason,
        seed=0,
        text="",
    )


def rollout(index: int, *completions: ScoredCompletion, attempt: int = 0, run_id: str = "run-1") -> Rollout:
    return Rollout(
        rollout_id=f"{run_id}/{index}/{attempt}",
        run_id=run_id,
        prompt_index=index,
        attempt=attempt,
        prompt="prompt",
        metadata={},
        completions=completions or (scored([1, 2, 3], 1),),
        sampling=Sampling(),
        reward_sha256="",
        reference_sha256="",
        worker="worker-0",
        created_unix_s=0.0,
    )


@torch.no_grad()
def sampled_rollouts(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    reward: Callable[[list[int]], float],
    *,
    new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator,
    weights: WeightVersion = VERSION,
) -> list[Rollout]:
    """Completions of `new_tokens` tokens each, by full forward passes over right-padded rows."""
    rows = torch.arange(len(prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()) + new_tokens, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    logprobs = torch.zeros(len(prompts), new_tokens)
    ref_logprobs = torch.zeros(len(prompts), new_tokens)
    for t in range(new_tokens):
        log_p, ref_log_p = (
            torch.log_softmax(model(input_ids=tokens).logits[rows, lengths + t - 1].float() / temperature, -1)
            for model in (policy, reference)
        )
        sampled = torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(1)
        tokens[rows, lengths + t] = sampled
        logprobs[:, t], ref_logprobs[:, t] = log_p[rows, sampled], ref_log_p[rows, sampled]
    made = []
    for row, prompt in enumerate(prompts):
        sequence = tokens[row, : len(prompt) + new_tokens].tolist()
        completion = scored(
            sequence,
            len(prompt),
            score=reward(sequence[len(prompt) :]),
            logprobs=logprobs[row].tolist(),
            ref_logprobs=ref_logprobs[row].tolist(),
            finish_reason=FinishReason.LENGTH,
            weights=weights,
        )
        made.append(rollout(row, completion))
    return made
