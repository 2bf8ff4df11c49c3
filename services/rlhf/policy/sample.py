"""`rlhf sample`: completions of prompts from a file, with the service's engine but without the service."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.prompts import Prompt, encode_prompt, read_prompts
from rlhf.data.samples import Sampled, SampledCompletion, write_samples
from rlhf.data.sampling import sampling_of
from rlhf.errors import ModelError
from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.models.compute import set_threads
from rlhf.models.folders import start_model
from rlhf.models.tokenizer import load_tokenizer
from rlhf.observe.progress import progress
from rlhf.policy.continuous import ContinuousEngine, Limits
from rlhf.policy.engine import SEEDS, Engine, Failed, Finished, GenerationRequest
from rlhf.policy.requests import check_prompts, check_sampling
from rlhf.wire.records import Completion, LogprobMode, Sampling, Stopping, Tokens, WeightVersion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.settings.run import Settings

UNNAMED = WeightVersion("", 0, 0, "")


def run(settings: Settings) -> Mapping[str, Any]:
    """Writes `sample.completions` completions of each prompt to the run's samples, and those of held-out prompts apart.

    Raises:
        DataError, ModelError, StorageError: see the readers and writers.
    """
    sample, paths = settings.sample, settings.paths
    set_threads(sample.threads)
    prompts = read_prompts(sample.prompts or paths.prompts, sample.limit)
    heldout = _heldout_prompts(settings)
    out = sample.out or paths.samples
    began = time.monotonic()
    samples = _sample(settings, prompts, heldout)
    figures = _figures(out, samples, time.monotonic() - began)
    write_samples(out, samples[: len(prompts)])
    paths.heldout_samples.unlink(missing_ok=True)
    if heldout:
        write_samples(paths.heldout_samples, samples[len(prompts) :])
    return figures


def _heldout_prompts(settings: Settings) -> list[Prompt]:
    limit = settings.sample.heldout_limit
    return read_prompts(settings.sample.heldout_prompts or settings.paths.heldout_prompts, limit) if limit else []


def _sample(settings: Settings, *parts: Sequence[Prompt]) -> list[Sampled]:
    """Of all parts at once, end to end; a prompt's index is its place in its own part."""
    sample, prompts = settings.sample, list(chain(*parts))
    folder = sample.model or start_model(settings)
    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(folder, device=sample.device, dtype=sample.dtype)
    sampling, stopping = sampling_of(settings.sampling, sample.completions, sample.seed)
    version = WeightVersion("", 0, 0, weights_sha256(folder))
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    with progress("sample", total=len(prompts) * sample.completions, unit="completions") as bar:
        answers = generate(model, tokenizer, encoded, sampling, stopping, version=version, on_finished=bar.advance)
    indices = chain(*(range(len(part)) for part in parts))
    return [
        Sampled(index, prompt.text, prompt.metadata, tuple(map(_sampled, completions)), sampling, version)
        for index, prompt, completions in zip(indices, prompts, answers, strict=True)
    ]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    sampling: Sampling,
    stopping: Stopping,
    *,
    logprob_mode: LogprobMode = LogprobMode.TEMPERATURE,
    limits: Limits | None = None,
    version: WeightVersion = UNNAMED,
    on_finished: Callable[[], None] = lambda: None,
) -> list[list[Completion]]:
    """K completions of every prompt, in the order of the prompts.

    Completion k of prompt i is sampled with seed + i·K + k, so that equal prompts get different completions and every
    completion can be repeated by itself.

    Args:
        model: put into eval mode while this runs.
        prompts: each [P].
        limits: of the engine; those on the waiting line do not apply. None: the engine's defaults.
        version: stamped on the completions.
        on_finished: called after each completion.

    Raises:
        RequestError: a prompt or a number cannot be used.
        ModelError: the model cannot be served, or its logits are not finite.
    """
    limits = replace(limits or Limits(), max_waiting_sequences=max(1, len(prompts) * sampling.completions))
    with _evaluating(model):
        engine = ContinuousEngine(model, tokenizer, version, limits)
        check_sampling(sampling, stopping, engine.info.vocab_size)
        check_prompts(prompts, engine.info)
        seed = secrets.randbelow(SEEDS) if sampling.seed is None else sampling.seed
        requests = [
            GenerationRequest(i * sampling.completions + k, prompt, 0, sampling, stopping, logprob_mode)
            for i, prompt in enumerate(prompts)
            for k in range(sampling.completions)
        ]
        requests = [replace(request, seed=(seed + request.id) % SEEDS) for request in requests]
        finished = _run(engine, requests, on_finished)
    completions = [_completion(finished[request.id], request) for request in requests]
    k = sampling.completions
    return [completions[i * k : (i + 1) * k] for i in range(len(prompts))]


def _run(engine: Engine, requests: Sequence[GenerationRequest], on_finished: Callable[[], None]) -> dict[int, Finished]:
    engine.submit(requests)
    finished: dict[int, Finished] = {}
    while len(finished) < len(requests):
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            assert isinstance(event, Finished), "nothing here streams"
            finished[event.id] = event
            on_finished()
    return finished


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)


def _completion(finished: Finished, request: GenerationRequest) -> Completion:
    prompt_index, completion_index = divmod(request.id, request.sampling.completions)
    return Completion(
        prompt_index=prompt_index,
        completion_index=completion_index,
        token_ids=finished.token_ids,
        logprobs=finished.logprobs,
        logprob_mode=request.logprob_mode,
        text=finished.text,
        finish_reason=finished.finish_reason,
        stopped_by=finished.stopped_by,
        versions=finished.versions,
        seed=request.seed,
    )


def _sampled(completion: Completion) -> SampledCompletion:
    if completion.logprobs is None:
        raise ModelError("samples are written with their log-probs, and these have none")
    return SampledCompletion(
        text=completion.text,
        token_ids=tuple(completion.token_ids.tolist()),
        logprobs=tuple(completion.logprobs.tolist()),
        finish_reason=completion.finish_reason,
        seed=completion.seed,
    )


def _figures(out: Path, samples: Sequence[Sampled], seconds: float) -> dict[str, Any]:
    completions = [completion for sampled in samples for completion in sampled.completions]
    tokens = sum(len(completion.token_ids) for completion in completions)
    ended = sum(completion.finish_reason.ended for completion in completions)
    return {
        "out": str(out),
        "prompts": len(samples),
        "completions": len(completions),
        "tokens": tokens,
        "ended_share": ended / max(1, len(completions)),
        "tokens_per_s": tokens / max(seconds, 1e-9),
    }
