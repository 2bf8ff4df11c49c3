"""What the monitor measures on a batch before the step changes the weights: all that `rlhf.ppo.invariants` asks for and
that the step's own figures do not hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.ppo.agreement import LOGPROB_BOUNDS, Agreement, agreement
from rlhf.ppo.experience import Experience, gather, minibatches
from rlhf.ppo.invariants import Watched
from rlhf.ppo.learner import Assessment, Learner
from rlhf.wire.records import FinishReason, Floats, Rollout, Sampling, ScoredCompletion, Tokens, WeightVersion

TEXTS = 16
"""Completions of a batch whose tokens are decoded again."""
BIGRAM_TOKENS = 64
"""Tokens of a completion whose pairs count: with longer texts the share of distinct ones falls by itself."""
_PLAIN = Sampling()


def watch(
    rollouts: Sequence[Rollout],
    experience: Experience,
    before: Assessment,
    present: WeightVersion | None,
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: frozenset[int],
) -> tuple[Watched, dict[str, float]]:
    """
    Args:
        before: of the weights before the step.
        present: those weights; None: they were never published.

    Returns:
        What the batch shows, and figures of which curves can be drawn: `kl_standard_error` of the mean KL over
        completions, in nats, and `distinct_bigrams`; each left out where there are too few to tell.
    """
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    responses = [completion.token_ids[completion.response_mask] for completion in completions]
    texts = [completion for completion in completions if completion.text][:TEXTS]
    mask = experience.response_mask
    kl = before.logprobs - before.ref_logprobs if before.kl is None else before.kl
    watched = Watched(
        policies=_fresh(completions, experience, before, present, learner),
        reference=agreement("the reference", before.ref_logprobs[mask].numpy(), before.logprobs[mask].numpy()),
        other_sampling=sorted({how for one in rollouts if (how := _otherwise(one.sampling, learner.temperature))}),
        other_texts=sum(not _is_its_text(completion, tokenizer) for completion in texts),
        texts=len(texts),
        tokens_after_end=sum(tokens_after_end(response, end_token_ids) for response in responses),
        tokens=int(mask.sum()),
    )
    figures = {
        "kl_standard_error": _standard_error(experience.sum_per_sequence(kl)),
        "distinct_bigrams": distinct_bigrams(responses),
    }
    return watched, {name: value for name, value in figures.items() if value is not None}


def probed(name: str, rollout: Rollout, learner: Learner) -> Agreement:
    """A replica's answer to a probe, made into a rollout, against the learner's present weights."""
    experience = gather([rollout])
    given, expected = _service(experience), _expected(learner, experience)
    return _compared(name, given, expected, learner, lambda: _expected(_at_temperature_1(learner), experience))


def tokens_after_end(response: Tokens, end_token_ids: frozenset[int]) -> int:
    ends = np.flatnonzero(np.isin(response, list(end_token_ids)))
    return len(response) - 1 - int(ends[0]) if len(ends) else 0


def distinct_bigrams(responses: Sequence[Tokens]) -> float | None:
    """The share of the pairs of neighbouring tokens that are distinct, over all responses. None: there is no pair."""
    pairs = np.concatenate([np.stack([r[:-1], r[1:]], axis=1) for r in (r[:BIGRAM_TOKENS] for r in responses)])
    return len(np.unique(pairs, axis=0)) / len(pairs) if len(pairs) else None


def _fresh(
    completions: Sequence[ScoredCompletion],
    experience: Experience,
    before: Assessment,
    present: WeightVersion | None,
    learner: Learner,
) -> list[Agreement]:
    """Of the tokens that the present weights sampled, by version: after a restart two have the same weights."""
    mask = experience.response_mask
    given, expected = _service(experience), before.logprobs[mask].numpy()
    found = []
    for version, at in _by_version(completions):
        if present is not None and version.sha256 == present.sha256:

            def raw(at: NDArray[np.bool_] = at) -> Floats:
                return _expected(_at_temperature_1(learner), experience)[at]

            found.append(_compared(str(version), given[at], expected[at], learner, raw))
    return found


def _by_version(completions: Sequence[ScoredCompletion]) -> Iterator[tuple[WeightVersion, NDArray[np.bool_]]]:
    """Each version with the sampled tokens of the batch that it stands behind, [sampled tokens] bool."""
    spans = [(span.version, span.end - span.start) for completion in completions for span in completion.versions]
    behind = np.repeat(np.arange(len(spans)), [tokens for _, tokens in spans])
    for version in sorted({version for version, _ in spans}, key=str):
        yield version, np.isin(behind, [i for i, (other, _) in enumerate(spans) if other == version])


def _compared(of: str, given: Floats, expected: Floats, learner: Learner, raw: Callable[[], Floats]) -> Agreement:
    """
    Args:
        raw: expected at temperature 1; asked for only where the temperature is another and they disagree.
    """
    found = agreement(of, given, expected)
    # Whether it is too much is for the invariant to say.
    if learner.temperature == 1 or found.within(LOGPROB_BOUNDS["float32"]):
        return found
    return agreement(of, given, expected, raw())


def _at_temperature_1(learner: Learner) -> Learner:
    """The same weights."""
    other = copy.copy(learner)
    other.temperature = 1.0
    return other


def _expected(learner: Learner, experience: Experience) -> Floats:
    """[sampled tokens]: the learner's log-probs of them."""
    order = torch.arange(experience.sequences)
    (micro_batches,) = minibatches(experience, 1, learner.settings.micro_batch_tokens, order)
    found: Floats = learner.assess(experience, micro_batches).logprobs[experience.response_mask].numpy()
    return found


def _service(experience: Experience) -> Floats:
    """[sampled tokens]: the policy service's log-probs of them."""
    found: Floats = experience.service_logprobs[experience.response_mask].numpy()
    return found


def _otherwise(sampling: Sampling, temperature: float) -> str:
    """How a rollout was sampled, if not from the policy at this temperature; empty: so it was."""
    expected = {"temperature": temperature, **{name: getattr(_PLAIN, name) for name in _FILTERS}}
    # The temperature travels as float32.
    odd = [name for name, value in expected.items() if not np.isclose(getattr(sampling, name), value, rtol=1e-6)]
    return ", ".join(f"{name} {getattr(sampling, name):g} in place of {expected[name]:g}" for name in odd)


_FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")


def _is_its_text(completion: ScoredCompletion, tokenizer: PreTrainedTokenizerBase) -> bool:
    token_ids = completion.token_ids[completion.response_mask].tolist()
    text = str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    # A stop string is cut off the text, not off the tokens.
    return text == completion.text or (
        completion.finish_reason is FinishReason.STOP_STRING and text.startswith(completion.text)
    )


def _standard_error(values: Tensor) -> float | None:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
