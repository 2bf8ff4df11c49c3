"""The doctor's questions to models, by trying them: does the policy say the log-probs it should, does a score depend on
what else is in the batch, and can an end be told from padding?

Models in folders are tried where no service answers. torch is imported here by the functions that need it alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from rlhf.doctor.findings import Finding
from rlhf.errors import InputError, WeightsMismatch
from rlhf.models.folders import start_model
from rlhf.ppo.agreement import MEAN_SHARE, Agreement, agreement, cause, logprob_bound
from rlhf.queues.registry import Current
from rlhf.reward.rules import ScoreItem, load_rule
from rlhf.serving.client import call_sync, connect_sync
from rlhf.settings.run import Settings
from rlhf.v1 import policy_pb2, policy_pb2_grpc, reward_pb2, reward_pb2_grpc
from rlhf.wire.messages import from_completion, from_version
from rlhf.wire.records import Floats, Tokens, WeightVersion
from rlhf.wire.tensors import from_tensor

TIMEOUT_S = 30.0
LARGEST_GIB = 4.0
"""A model up to this size is loaded to compare with; of a larger one the doctor would take too long."""
TEMPERATURE, TOP_P, TOKENS = 0.7, 0.8, 16
"""Of the completion that the policy is asked for: none of them what a service does by itself."""
SCORE_BOUNDS = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""By which a score may depend on the shape of the batch, against scores with standard deviation 1 or, where they are
larger, against the largest: sums in another order round otherwise, and by no more than this."""
PROMPT = "The "
COMPLETIONS = (" end.", " one was good, and the other one was better than that.", " same again and again.", " no")

Scores = Callable[[Sequence[ScoreItem]], Floats]


def check_tokens(settings: Settings) -> Iterator[Finding]:
    """Of the model that step 3 starts from, and of the reward model."""
    try:
        policy = settings.ppo.model or start_model(settings)
    except InputError:
        policy = None  # a stage of the run will make it
    for what, folder in (("policy", policy), ("reward model", _reward_folder(settings))):
        if folder is not None and folder.is_dir():
            yield _end_and_pad(what, folder)


def check_reward(settings: Settings, address: str | None) -> Iterator[Finding]:
    """A score is of one completion: whatever else is in the call, in whatever order, padded to whatever length.

    Args:
        address: of the reward service, if one answers.
    """
    items = _items(settings)
    score = _scores_of_service(settings, address) if address else _scores_of_folder(settings)
    if score is None:
        return
    together, backwards = score(items), score(items[::-1])[::-1]
    alone = np.concatenate([score([item]) for item in items])
    bound = SCORE_BOUNDS[settings.reward.dtype] * max(1.0, float(np.abs(alone).max()))
    worst = float(np.abs(np.stack([together, backwards]) - alone).max())
    what = (
        f"{len(items)} completions score alike alone, together and backwards, up to {worst:.1g}"
        if worst <= bound
        else f"a completion's score changes by {worst:.2g} with what else is in the call, where {bound:.1g} is rounding"
    )
    remedy = "a reward model must read its attention mask, and a rule must look at one item at a time"
    yield Finding("reward", worst <= bound, what, remedy)


def check_logprobs(settings: Settings, addresses: Mapping[str, str], current: Current | None) -> Iterator[Finding]:
    """Each policy's log-probs against those computed here of the weights that it says it holds.

    Args:
        addresses: of the policies that answer, by name.
        current: the run's weights. None: there is no run.
    """
    for name, address in addresses.items():
        try:
            yield _compare(settings, name, address, current)
        except WeightsMismatch:
            yield Finding("log-probs", True, f"{name} was given other weights meanwhile; not compared")


@dataclass(frozen=True)
class _Answer:
    """One completion, and what the policy says of itself."""

    info: policy_pb2.PolicyInfoResponse
    version: WeightVersion
    prompt_ids: Tokens
    token_ids: Tokens
    logprobs: Floats


def _compare(settings: Settings, name: str, address: str, current: Current | None) -> Finding:
    answer = _ask(settings, address)
    folder = settings.policy.model or start_model(settings)
    weights = _weights_of(answer.version, current)
    size_gib = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
    if size_gib > LARGEST_GIB:
        why = f"{folder} has {size_gib:.0f} GiB, and the doctor loads {LARGEST_GIB:g} at most; the trainer compares"
        return Finding("log-probs", True, f"{name}'s are not compared: {why}")
    if weights is None and not _is_of(folder, answer.version):
        return Finding("log-probs", True, f"{name}'s are not compared: it does not hold the weights of {folder}")
    found, bound = _agreement(name, answer, folder, weights), logprob_bound([answer.info.dtype])
    if found.within(bound):
        return Finding("log-probs", True, f"{name}'s are those of its weights, up to {found.largest:.1g} nats")
    what = (
        f"{name}'s differ from those of {answer.version} by up to {found.largest:.2g} nats and {found.mean:.2g} on "
        f"average, where {bound:g} and {MEAN_SHARE * bound:g} are rounding; {cause(found, bound)}"
    )
    return Finding("log-probs", False, what, f"start {name} again, with the weights and tokenizer of the run")


def _ask(settings: Settings, address: str) -> _Answer:
    """
    Raises:
        WeightsMismatch: the weights changed between the two questions.
    """
    rollouts = settings.rollouts
    with connect_sync(address, token_file=rollouts.token_file, tls_ca=rollouts.tls_ca) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        info = call_sync(stub.Info, policy_pb2.PolicyInfoRequest(), timeout_s=TIMEOUT_S)
        request = policy_pb2.GenerateRequest(
            prompts=[policy_pb2.Prompt(text=PROMPT)],
            sampling=policy_pb2.Sampling(temperature=TEMPERATURE, top_p=TOP_P, seed=1),
            stopping=policy_pb2.Stopping(max_new_tokens=min(TOKENS, info.max_new_tokens), ignore_eos=True),
            logprob_mode=policy_pb2.LOGPROB_MODE_TEMPERATURE,
            weights=policy_pb2.WeightRequirement(exactly=info.current),
        )
        answer = call_sync(stub.Generate, request, timeout_s=TIMEOUT_S)
    completion = from_completion(answer.completions[0])
    assert completion.logprobs is not None, "the request asks for them"
    prompt_ids = from_tensor(answer.prompts[0].token_ids, "prompts.token_ids", dtypes="i", ndim=1)
    return _Answer(info, from_version(info.current), prompt_ids, completion.token_ids, completion.logprobs)


def _weights_of(version: WeightVersion, current: Current | None) -> Path | None:
    """The folder that the trainer wrote these weights to. None: they are no weights of a run.

    Raises:
        WeightsMismatch: they are not the run's current ones.
    """
    if not version.run_id:
        return None
    if current is None or current.version != version:
        raise WeightsMismatch(f"{version} is not what is current")
    return Path(url2pathname(urlsplit(current.uri).path))


def _is_of(folder: Path, version: WeightVersion) -> bool:
    from rlhf.models.causal import weights_sha256

    return weights_sha256(folder) == version.sha256


def _agreement(name: str, answer: _Answer, folder: Path, weights: Path | None) -> Agreement:
    """By the definition: the whole model over the whole text, log_softmax, and the sampled token's entry."""
    import torch

    from rlhf.models.base import Base
    from rlhf.models.causal import load_causal_lm, weights_sha256
    from rlhf.models.weights import copy_weights, load_weights, read_manifest

    model = load_causal_lm(folder)
    if weights is not None:
        tensors, adapter = load_weights(weights, answer.version), read_manifest(weights).adapter
        if adapter is None:
            copy_weights(model, tensors)
        else:
            Base(folder, weights_sha256(folder)).merge_into(model, tensors, adapter)
    token_ids = torch.from_numpy(np.concatenate([answer.prompt_ids, answer.token_ids]).astype(np.int64))
    sampled = token_ids[-len(answer.token_ids) :, None]
    with torch.inference_mode():
        logits = model(input_ids=token_ids[None]).logits[0, -len(sampled) - 1 : -1].double()
    raw, expected = (
        torch.log_softmax(logits / temperature, -1).gather(-1, sampled)[:, 0].numpy()
        for temperature in (1.0, TEMPERATURE)
    )
    return agreement(name, answer.logprobs, expected, raw)


def _end_and_pad(what: str, folder: Path) -> Finding:
    from rlhf.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    remedy = f"give the tokenizer in {folder} an end token and a pad token of its own, and save it there"
    told = f"the {what} ends with {tokenizer.eos_token!r} ({end}) and pads with {tokenizer.pad_token!r} ({pad})"
    if end is None:
        return Finding("tokens", False, f"the {what} has no end token, so nothing ever ends by itself", remedy)
    if end == pad:
        return Finding("tokens", False, f"{told}: an end cannot be told from padding", remedy)
    if vocabulary is not None and max(end, pad or 0) >= vocabulary:
        return Finding("tokens", False, f"{told}, and the model knows {vocabulary} tokens", remedy)
    return Finding("tokens", True, told)


def _reward_folder(settings: Settings) -> Path | None:
    return None if settings.reward.rule else settings.reward.model or settings.paths.reward_model


def _items(settings: Settings) -> list[ScoreItem]:
    """The run's first prompts, for the sake of their metadata, with completions of different lengths."""
    from rlhf.data.prompts import Prompt, read_prompts

    path = settings.ppo.prompts or settings.paths.prompts
    prompts = read_prompts(path, limit=len(COMPLETIONS)) if os.path.exists(path) else [Prompt(PROMPT, None, {})]
    return [
        ScoreItem(prompts[number % len(prompts)].text, completion, (), prompts[number % len(prompts)].metadata)
        for number, completion in enumerate(COMPLETIONS)
    ]


def _scores_of_service(settings: Settings, address: str) -> Scores:
    rollouts = settings.rollouts

    def score(items: Sequence[ScoreItem]) -> Floats:
        texts = [reward_pb2.TextItem(prompt=item.prompt, completion=item.completion) for item in items]
        metadata = [reward_pb2.Metadata(fields=item.metadata) for item in items]
        request = reward_pb2.ScoreRequest(texts=reward_pb2.TextBatch(items=texts), metadata=metadata)
        with connect_sync(address, token_file=rollouts.token_file, tls_ca=rollouts.tls_ca) as channel:
            answer = call_sync(reward_pb2_grpc.RewardServiceStub(channel).Score, request, timeout_s=TIMEOUT_S)
        return from_tensor(answer.scores, "scores", dtypes="f", ndim=1)

    return score


def _scores_of_folder(settings: Settings) -> Scores | None:
    """None: there is neither a rule nor a reward model yet."""
    if settings.reward.rule:
        return load_rule(settings.reward.rule).score
    folder = _reward_folder(settings)
    if folder is None or not folder.is_dir():
        return None
    from rlhf.reward.head import RewardHead
    from rlhf.reward.requests import Texts

    head = RewardHead.load(folder, settings.reward.device, settings.reward.dtype, settings.reward.threads)

    def score(items: Sequence[ScoreItem]) -> Floats:
        encoded = head.encode([Texts(item.prompt, item.completion) for item in items])
        answers = head.forward([head.reading(item) for item in encoded])
        return np.array([answer.score for answer in answers], dtype=np.float32)

    return score
