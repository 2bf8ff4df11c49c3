"""One task and the three services' answers, made into the rollout that the trainer reads."""

from __future__ import annotations

import time

import numpy as np

from rlhf.rollouts.services import Generated, References, Scores
from rlhf.wire.records import Completion, Floats, HiddenStates, PromptTask, Rollout, ScoredCompletion


def assemble(task: PromptTask, generated: Generated, scores: Scores, references: References, worker: str) -> Rollout:
    """The answers must have been checked to hold as many completions and tokens as each other."""
    completions = tuple(
        _scored(task, completion, index, scores, references) for index, completion in enumerate(generated.completions)
    )
    return Rollout(
        rollout_id=task.rollout_id,
        run_id=task.run_id,
        prompt_index=task.prompt_index,
        attempt=task.attempt,
        prompt=task.text,
        metadata=task.metadata,
        completions=completions,
        sampling=generated.sampling,
        reward_sha256=scores.model_sha256,
        reference_sha256=references.model_sha256,
        worker=worker,
        created_unix_s=time.time(),
    )


def _scored(
    task: PromptTask, completion: Completion, index: int, scores: Scores, references: References
) -> ScoredCompletion:
    prompt_length, count = len(task.token_ids), len(completion.token_ids)
    reference = references.answers[index]
    ref_hidden = reference if isinstance(reference, HiddenStates) else None
    assert completion.logprobs is not None
    return ScoredCompletion(
        token_ids=np.concatenate([task.token_ids, completion.token_ids]),
        response_mask=np.arange(prompt_length + count) >= prompt_length,
        logprobs=_after_prompt(completion.logprobs, prompt_length),
        ref_logprobs=None if isinstance(reference, HiddenStates) else _after_prompt(reference, prompt_length),
        score=float(scores.scores[index]),
        member_scores=scores.member_scores[index],
        token_rewards=None,
        versions=completion.versions,
        finish_reason=completion.finish_reason,
        seed=completion.seed,
        text=completion.text,
        ref_hidden=ref_hidden,
    )


def _after_prompt(values: Floats, prompt_length: int) -> Floats:
    """[R] -> [T]: the prompt's tokens were not sampled and have no log-prob; a mean that took NaN in would show it."""
    return np.concatenate([np.full(prompt_length, np.nan, np.float32), values])
