"""The engine on tiny models: what it samples is what a full forward pass of each finished sequence says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf.errors import ModelError, Overloaded, RequestError, WeightsMismatch
from rlhf.ops import logprobs_from_logits
from rlhf.policy.continuous import ContinuousEngine, Limits
from rlhf.policy.engine import Event, Failed, Finished, GenerationRequest, Requirement, TokenSampled
from rlhf.wire.records import FinishReason, LogprobMode, Sampling, Stopping, Tokens, WeightVersion
from support.tiny import tiny_lm, tiny_tokenizer

VERSION = WeightVersion("", 0, 0, "0" * 64)
SMALL = {
    "vocab_size": 280,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def other_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SMALL, initializer_range=0.5)).eval()
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**SMALL, initializer_range=0.5, sliding_window=64)).eval()
    neox = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**neox, initializer_range=0.5)).eval()


def model_named(name: str) -> PreTrainedModel:
    if name == "eager":
        model = tiny_lm()
        model.set_attn_implementation("eager")
        return model
    return tiny_lm(name) if name in ("llama", "gpt2") else other_model(name)


def engine_of(model: PreTrainedModel | None = None, **limits: int) -> ContinuousEngine:
    return ContinuousEngine(model or tiny_lm(), tiny_tokenizer(), VERSION, Limits(**limits))


def prompt(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(2, 280, length).astype(np.int32)


def request(id: int, length: int = 5, new: int = 8, **fields: Any) -> GenerationRequest:
    stopping = Stopping(new, **{"ignore_eos": True, **fields.pop("stopping", {})})
    sampling = fields.pop("sampling", Sampling())
    return GenerationRequest(id, fields.pop("prompt", prompt(length, id)), id, sampling, stopping, **fields)


def finish(engine: ContinuousEngine, submit: Iterable[GenerationRequest] = ()) -> dict[int, Finished]:
    engine.submit(list(submit))
    finished: dict[int, Finished] = {}
    while engine.load.running + engine.load.waiting:
        finished |= ended(engine.step())
    return finished


def ended(events: Sequence[Event]) -> dict[int, Finished]:
    for event in events:
        assert not isinstance(event, Failed), event
    return {event.id: event for event in events if isinstance(event, Finished)}


def full_logits(model: PreTrainedModel, asked: GenerationRequest, answer: Finished) -> torch.Tensor:
    tokens = torch.tensor(np.concatenate([asked.prompt, answer.token_ids]), dtype=torch.int64)
    with torch.no_grad():
        return model(tokens[None]).logits[0, len(asked.prompt) - 1 : -1]


def mixed_requests() -> list[GenerationRequest]:
    """24 of differing lengths, filters and log-prob modes."""
    lengths = np.random.default_rng(1).integers(1, 30, (24, 2))
    sampling = [Sampling(), Sampling(temperature=0.6), Sampling(temperature=1.3, top_k=20), Sampling(temperature=0)]
    modes = [LogprobMode.TEMPERATURE, LogprobMode.RAW]
    return [
        request(i, int(p), int(n), sampling=sampling[i % 4], logprob_mode=modes[i // 4 % 2])
        for i, (p, n) in enumerate(lengths)
    ]


def answers_through_joins_and_leaves(
    model: PreTrainedModel, requests: Sequence[GenerationRequest]
) -> dict[int, Finished]:
    engine = engine_of(model, max_sequences=5, max_prefill_tokens=40)
    return finish(engine, requests[:12]) | finish(engine, requests[12:])


def defined_logprobs(model: PreTrainedModel, asked: GenerationRequest, answer: Finished) -> np.ndarray:
    """By a full forward pass of the finished sequence."""
    temperature = asked.sampling.temperature or 1.0
    temperature = 1.0 if asked.logprob_mode is LogprobMode.RAW else temperature
    labels = torch.tensor(answer.token_ids, dtype=torch.int64)
    return logprobs_from_logits(full_logits(model, asked, answer), labels, temperature).logprobs.numpy()


@pytest.mark.parametrize("name", ["llama", "gpt2", "eager", "qwen2", "mistral", "neox"])
def test_logprobs_equal_a_full_forward_pass_through_joins_and_leaves(name: str) -> None:
    # In float64, so that a token seen or missed shows and the rounding of another order of sums does not.
    model, requests = model_named(name).double(), mixed_requests()
    answers = answers_through_joins_and_leaves(model, requests)
    for asked in requests:
        answer = answers[asked.id]
        assert len(answer.token_ids) == asked.stopping.max_new_tokens
        np.testing.assert_allclose(answer.logprobs, defined_logprobs(model, asked, answer), atol=2e-6, rtol=0)


def test_in_float32_the_engine_errs_as_little_as_a_full_forward_pass() -> None:
    model, exact, requests = tiny_lm(), tiny_lm().double(), mixed_requests()
    answers = answers_through_joins_and_leaves(model, requests)

    def error(found: Callable[[GenerationRequest, Finished], Any]) -> float:
        pairs = [
            (found(asked, answers[asked.id]), defined_logprobs(exact, asked, answers[asked.id])) for asked in requests
        ]
        return max(float(np.abs(one - truth).max()) for one, truth in pairs)

    plain = error(lambda asked, answer: defined_logprobs(model, asked, answer))
    assert error(lambda asked, answer: answer.logprobs) <= 2 * plain + 1e-5


def test_a_completion_does_not_depend_on_its_company() -> None:
    requests = [request(i, 3 + i, 6 + i % 5, sampling=Sampling(top_p=0.95 if i % 2 else 1.0)) for i in range(10)]
    together = finish(engine_of(max_sequences=4), requests)
    for asked in requests:
        alone = finish(engine_of(), [asked])[asked.id]
        assert alone.token_ids.tolist() == together[asked.id].token_ids.tolist()


def test_greedy_is_transformers_greedy() -> None:
    model = tiny_lm()
    asked = request(0, 7, 12, sampling=Sampling(temperature=0))
    answer = finish(engine_of(model), [asked, request(1, 20, 5)])[0]
    expected = model.generate(
        torch.tensor(asked.prompt, dtype=torch.int64)[None],
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
        pad_token_id=0,
        attention_mask=torch.ones(1, 7, dtype=torch.int64),
    )
    assert answer.token_ids.tolist() == expected[0, 7:].tolist()


def test_a_short_answer_does_not_wait_for_a_long_one() -> None:
    engine = engine_of(max_sequences=2)
    engine.submit([request(0, new=40), request(1, new=2), request(2, new=3)])
    order = [event.id for _ in range(40) for event in engine.step()]
    assert order == [1, 2, 0]


def test_completions_of_one_prompt_share_its_prefill() -> None:
    model = tiny_lm()
    seen: list[tuple[int, ...]] = []
    model.base_model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)) if args else None)
    shared = prompt(9)
    answers = finish(engine_of(model), [request(i, prompt=shared, new=4) for i in range(5)] + [request(9, 4)])
    assert seen == [(2, 8)]
    for id, answer in answers.items():
        alone = finish(engine_of(), [request(id, prompt=shared, new=4) if id < 9 else request(9, 4)])
        assert alone[id].token_ids.tolist() == answer.token_ids.tolist()


def test_a_prefill_is_bounded_and_a_longer_prompt_goes_alone() -> None:
    model = tiny_lm()
    seen: list[tuple[int, ...]] = []
    model.base_model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)) if args else None)
    finish(engine_of(model, max_prefill_tokens=20), [request(0, 10), request(1, 10), request(2, 10), request(3, 30)])
    assert seen == [(2, 9), (1, 9), (1, 29)]


def test_admission_is_bounded_by_sequences_and_by_reserved_tokens() -> None:
    engine = engine_of(max_sequences=3, max_batch_tokens=50)
    engine.submit([request(0, 10, 10), request(1, 10, 10), request(2, 5, 20)])
    engine.step()
    assert (engine.load.running, engine.load.waiting) == (2, 1)
    few = engine_of(max_sequences=1)
    few.submit([request(0), request(1)])
    few.step()
    assert (few.load.running, few.load.waiting) == (1, 1)


def test_a_full_line_says_when_to_come_back() -> None:
    engine = engine_of(max_waiting_sequences=3, max_sequences=1)
    engine.submit([request(i, new=2) for i in range(3)])
    with pytest.raises(Overloaded, match="3 sequences waiting") as refused:
        engine.submit([request(9)])
    assert 0 < refused.value.retry_after_s <= 30
    finish(engine)
    assert len(finish(engine, [request(9)])) == 1


def test_what_can_never_be_admitted_is_refused_for_good() -> None:
    with pytest.raises(RequestError, match="4 completions"):
        engine_of(max_waiting_sequences=3).submit([request(i) for i in range(4)])
    with pytest.raises(RequestError, match="max_batch_tokens"):
        engine_of(max_batch_tokens=20).submit([request(0, 10, 11)])


def test_aborted_sequences_leave_at_once_and_nobody_notices() -> None:
    engine = engine_of(max_sequences=4)
    requests = [request(i, 4 + i, 10) for i in range(6)]
    engine.submit(requests)
    engine.step()
    engine.abort([0, 2, 5, 77])
    assert (engine.load.running, engine.load.waiting) == (2, 1)
    finished = finish(engine)
    assert finished.keys() == {1, 3, 4}
    for id, answer in finished.items():
        assert answer.token_ids.tolist() == finish(engine_of(), [requests[id]])[id].token_ids.tolist()


def test_the_context_cuts_a_response() -> None:
    answer = finish(engine_of(), [request(0, 60, 50)])[0]
    assert len(answer.token_ids) == 4
    assert (answer.finish_reason, answer.stopped_by) == (FinishReason.LENGTH, "")


def test_end_tokens_stop_tokens_and_ignore_eos() -> None:
    greedy = Sampling(temperature=0)
    free = finish(engine_of(), [request(0, sampling=greedy)])[0].token_ids.tolist()
    first = free[0]
    model = tiny_lm()
    model.generation_config.eos_token_id = [free[2], 279]
    engine = engine_of(model)
    ended_by = {
        "eos": request(0, prompt=prompt(5), sampling=greedy, stopping={"ignore_eos": False}),
        "ignored": request(1, prompt=prompt(5), sampling=greedy),
        "stop": request(2, prompt=prompt(5), sampling=greedy, stopping={"stop_token_ids": (first,)}),
    }
    answers = finish(engine, ended_by.values())
    assert answers[0].finish_reason is FinishReason.EOS
    assert answers[0].token_ids.tolist() == free[: free.index(free[2]) + 1]
    assert answers[1].token_ids.tolist() == free
    assert (answers[2].finish_reason, answers[2].stopped_by) == (FinishReason.STOP_TOKEN, str(first))
    assert answers[2].token_ids.tolist() == free[:1]


def force(model: PreTrainedModel, text: str) -> GenerationRequest:
    """A model that says `text` after any prompt ending in its first token, and a request for it."""
    ids = tiny_tokenizer()(text).input_ids
    assert len(set(ids)) == len(ids), "each token names its successor"

    def successor(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        logits = torch.full_like(output.logits, -9.0)
        following = dict(zip(ids, [*ids[1:], 1], strict=True))
        for row, token in enumerate(kwargs["input_ids"][:, -1].tolist()):
            logits[row, -1, following.get(token, 1)] = 9.0
        output.logits = logits
        return output

    model.register_forward_hook(successor, with_kwargs=True)
    return request(0, prompt=np.array([ids[0]], dtype=np.int32), new=len(ids) - 1, sampling=Sampling(temperature=0))


@pytest.mark.parametrize(
    ("stops", "text", "stopped_by"),
    [(("xyz", "mé"), "br ", "mé"), (("m",), "br ", "m"), (("é", "r "), "b", "r "), (("zz",), "br mé🙂", "")],
)
def test_stop_strings_cut_the_text_and_keep_the_tokens(stops: tuple[str, ...], text: str, stopped_by: str) -> None:
    model = tiny_lm()
    asked = force(model, "abr mé🙂")
    stopping = Stopping(asked.stopping.max_new_tokens, stop_strings=stops, ignore_eos=True)
    asked = GenerationRequest(0, asked.prompt, 0, asked.sampling, stopping, stream=True)
    engine = engine_of(model)
    engine.submit([asked])
    events: list[Event] = []
    while not ended(events):
        events += engine.step()
    answer = ended(events)[0]
    assert (answer.text, answer.stopped_by) == (text, stopped_by)
    tokens = [event for event in events if isinstance(event, TokenSampled)]
    assert [event.token_id for event in tokens] == answer.token_ids.tolist()
    assert [event.logprob for event in tokens] == pytest.approx(answer.logprobs.tolist())
    assert "".join(event.text for event in tokens).startswith(text)
    assert tiny_tokenizer().decode(answer.token_ids).startswith(text + stopped_by)


def test_a_stop_string_before_min_new_tokens_does_not_count() -> None:
    model = tiny_lm()
    asked = force(model, "abcdefg")
    stopping = Stopping(asked.stopping.max_new_tokens, 3, stop_strings=("bc", "ef"), ignore_eos=True)
    answer = finish(engine_of(model), [GenerationRequest(0, asked.prompt, 0, asked.sampling, stopping)])[0]
    assert (answer.text, answer.stopped_by) == ("bcd", "ef")


def test_mode_none_has_no_logprobs() -> None:
    assert finish(engine_of(), [request(0, logprob_mode=LogprobMode.NONE)])[0].logprobs is None


def test_a_requirement_is_checked_at_admission() -> None:
    engine = engine_of()
    wanted = WeightVersion("run", 0, 3, "")
    engine.submit([request(0, requirement=Requirement(at_least=wanted)), request(1)])
    events = engine.step()
    failed = [event for event in events if isinstance(event, Failed)]
    assert [event.id for event in failed] == [0]
    assert isinstance(failed[0].error, WeightsMismatch)
    assert engine.load.running == 1


def test_logits_that_are_not_finite_fail_their_sequence_only() -> None:
    model = tiny_lm()

    def spoil(_: Any, args: Any, output: Any) -> None:
        output.logits[0] = torch.nan

    model.register_forward_hook(spoil)
    engine = engine_of(model)
    engine.submit([request(0, new=1), request(1, new=1)])
    events = {event.id: event for event in engine.step()}
    assert isinstance(events[0], Failed)
    assert isinstance(events[1], Finished)


def test_models_whose_memory_is_no_row_are_refused() -> None:
    small = {"vocab_size": 280, "hidden_size": 16, "num_hidden_layers": 1}
    mamba = MambaForCausalLM(MambaConfig(**small, state_size=4, pad_token_id=1, bos_token_id=1, eos_token_id=1))
    window = MistralForCausalLM(MistralConfig(**{**SMALL, "sliding_window": 32}))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=280, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    falcon = FalconForCausalLM(FalconConfig(**small, num_attention_heads=2, alibi=True))
    for model, said in (
        (falcon, "ALiBi"),
        (mamba, "remembers by LinearAttentionLayer"),
        (window, "window of 32"),
        (t5, "encoder-decoder"),
    ):
        with pytest.raises(ModelError, match=said):
            engine_of(model)
