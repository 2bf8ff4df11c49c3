"""Asks every policy replica to complete one prompt on the weights just published, so that its log-probs can be compared
with the trainer's: a replica that says it holds new weights and generates with others is found by nothing else. Where
generation overlaps training, no rollout ever comes from the trainer's present weights, and this is the only look."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from rlhf.errors import TransientError, WeightsMismatch
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.serving.client import call_sync
from rlhf.v1 import policy_pb2, policy_pb2_grpc
from rlhf.wire.messages import from_completion, to_version
from rlhf.wire.records import Completion, Rollout, Sampling, ScoredCompletion, WeightVersion
from rlhf.wire.tensors import to_tensor

log = logging.getLogger(__name__)

TOKENS = 8


def probe(
    channels: Mapping[str, grpc.Channel],
    prompt: EncodedPrompt,
    version: WeightVersion,
    *,
    temperature: float,
    tokenizer_sha256: str,
    timeout_s: float,
) -> dict[str, Rollout]:
    """
    Args:
        channels: to the replicas, by name.

    Returns:
        The answers as rollouts without score and reference, by the replica's name; of those that are away, or hold
        other weights, none.

    Raises:
        RlhfError: a replica refuses, for a reason that trying again would not change.
    """

    def ask(name: str) -> Rollout | None:
        request = _request(name, prompt, version, temperature, tokenizer_sha256)
        try:
            stub = policy_pb2_grpc.PolicyServiceStub(channels[name])
            answer = call_sync(stub.Generate, request, timeout_s=timeout_s)
        except (TransientError, WeightsMismatch) as error:
            log.info("%s was not probed: %s", name, error)
            return None
        return _as_rollout(name, prompt, temperature, from_completion(answer.completions[0]))

    with ThreadPoolExecutor(max_workers=16) as pool:
        answers = zip(channels, pool.map(ask, channels), strict=True)
        return {name: rollout for name, rollout in answers if rollout is not None}


def _request(
    name: str, prompt: EncodedPrompt, version: WeightVersion, temperature: float, tokenizer_sha256: str
) -> policy_pb2.GenerateRequest:
    return policy_pb2.GenerateRequest(
        request_id=f"probe/{name}/{version}",
        prompts=[policy_pb2.Prompt(token_ids=to_tensor(prompt.token_ids, np.int32))],
        sampling=policy_pb2.Sampling(temperature=temperature, seed=version.step),
        stopping=policy_pb2.Stopping(max_new_tokens=TOKENS, ignore_eos=True),
        logprob_mode=policy_pb2.LOGPROB_MODE_TEMPERATURE,
        weights=policy_pb2.WeightRequirement(exactly=to_version(version)),
        tokenizer_sha256=tokenizer_sha256,
    )


def _as_rollout(name: str, prompt: EncodedPrompt, temperature: float, completion: Completion) -> Rollout:
    assert completion.logprobs is not None, "the request asks for them"
    prompt_length, count = len(prompt.token_ids), len(completion.token_ids)
    unknown = np.full(prompt_length, np.nan, np.float32)
    scored = ScoredCompletion(
        token_ids=np.concatenate([prompt.token_ids, completion.token_ids]),
        response_mask=np.arange(prompt_length + count) >= prompt_length,
        logprobs=np.concatenate([unknown, completion.logprobs]),
        ref_logprobs=np.full(prompt_length + count, np.nan, np.float32),
        score=0.0,
        member_scores=np.zeros(1, np.float32),
        token_rewards=None,
        versions=completion.versions,
        finish_reason=completion.finish_reason,
        seed=completion.seed,
        text=completion.text,
    )
    return Rollout(
        rollout_id=f"probe/{name}",
        run_id="",
        prompt_index=0,
        attempt=0,
        prompt=prompt.text,
        metadata={},
        completions=(scored,),
        sampling=Sampling(temperature),
        reward_sha256="",
        reference_sha256="",
        worker="",
        created_unix_s=0.0,
    )
