"""The policy service on loopback, with a tiny language model, called through its protos."""

from __future__ import annotations

import asyncio
import functools
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rlhf import errors
from rlhf.models.adapters import add_adapter, merged
from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.models.tokenizer import tokenizer_sha256
from rlhf.models.weights import WEIGHTS_FILE, named_weights, write_weights
from rlhf.policy import requests
from rlhf.policy.continuous import ContinuousEngine
from rlhf.policy.engine import Versions
from rlhf.policy.server import POLICY, SERVICES, WEIGHTS, load_engine, serving, starting
from rlhf.policy.settings import PolicySettings
from rlhf.ppo.settings import LoraSettings
from rlhf.serving.client import call, connect, connect_sync, stream
from rlhf.serving.server import Server, run_server, running
from rlhf.settings.run import Settings
from rlhf.v1 import policy_pb2, policy_pb2_grpc, weights_pb2, weights_pb2_grpc
from rlhf.wire.messages import from_completion, from_version, to_version
from rlhf.wire.records import Completion, FinishReason, WeightVersion
from rlhf.wire.tensors import from_tensor, to_tensor
from support.reflection import ReflectedService
from support.tiny import tiny_lm, tiny_lm_folder, tiny_tokenizer

Test = Callable[..., Awaitable[None]]
OWN = tokenizer_sha256(tiny_tokenizer())


def in_loop(test: Test) -> Callable[..., None]:
    """A test that is a coroutine, in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm_folder(tmp_path_factory.mktemp("policy") / "model")


@dataclass
class Service:
    server: Server
    engine: ContinuousEngine
    policy: policy_pb2_grpc.PolicyServiceStub
    weights: weights_pb2_grpc.WeightsServiceStub

    async def generate(self, request: policy_pb2.GenerateRequest, timeout_s: float = 20) -> Any:
        return await call(self.policy.Generate, request, timeout_s=timeout_s)

    async def completions(self, request: policy_pb2.GenerateRequest) -> list[Completion]:
        return [from_completion(completion) for completion in (await self.generate(request)).completions]

    async def load(self) -> tuple[int, int]:
        info = await call(self.policy.Info, policy_pb2.PolicyInfoRequest(), timeout_s=5)
        return info.running, info.waiting

    async def until_load(self, running: int, waiting: int = 0) -> None:
        async with asyncio.timeout(10):
            while await self.load() != (running, waiting):  # noqa: ASYNC110 (a client can only ask)
                await asyncio.sleep(0.005)

    async def prepare(self, place: Path, version: WeightVersion, timeout_s: float = 20) -> Any:
        message = weights_pb2.PrepareRequest(version=to_version(version), uri=place.as_uri())
        return await call(self.weights.Prepare, message, timeout_s=timeout_s)

    async def upload(self, version: WeightVersion, data: bytes, adapter: weights_pb2.Adapter | None = None) -> Any:
        async def chunks() -> AsyncIterator[weights_pb2.UploadChunk]:
            yield weights_pb2.UploadChunk(version=to_version(version), data=data[:1000], adapter=adapter)
            for start in range(1000, len(data), 4096):
                yield weights_pb2.UploadChunk(data=data[start : start + 4096])

        return await call(self.weights.Upload, chunks(), timeout_s=20)

    async def commit(self, version: WeightVersion, expected: WeightVersion | None = None) -> Any:
        message = weights_pb2.CommitRequest(version=to_version(version))
        if expected is not None:
            message.expected_current.CopyFrom(to_version(expected))
        return await call(self.weights.Commit, message, timeout_s=20)


@asynccontextmanager
async def service(folder: Path, *, step_s: float = 0, **settings: Any) -> AsyncIterator[Service]:
    """A running service; with `step_s` every step takes at least that long, so that calls overlap for certain."""
    policy = PolicySettings(**{"model": folder, **settings})
    engine, codec = load_engine(Settings(policy=policy))
    assert isinstance(engine, ContinuousEngine)
    engine._current.model.register_forward_pre_hook(lambda *_: time.sleep(step_s))

    @asynccontextmanager
    async def start(server: Server) -> AsyncIterator[None]:
        async with serving(server, engine, codec, policy):
            await server.set_ready(POLICY, True)
            yield

    async with running("policy", policy, SERVICES, start) as server, connect(server.address) as channel:
        stubs = policy_pb2_grpc.PolicyServiceStub(channel), weights_pb2_grpc.WeightsServiceStub(channel)
        yield Service(server, engine, *stubs)


def request(*prompts: Sequence[int], new: int = 6, **fields: Any) -> policy_pb2.GenerateRequest:
    stopping = fields.pop("stopping", {})
    return policy_pb2.GenerateRequest(
        prompts=[policy_pb2.Prompt(token_ids=to_tensor(np.array(tokens, dtype=np.int32))) for tokens in prompts],
        stopping=policy_pb2.Stopping(**{"max_new_tokens": new, "ignore_eos": True, **stopping}),
        sampling=policy_pb2.Sampling(**{"seed": 3, **fields.pop("sampling", {})}),
        **fields,
    )


def seeded(seeds: Sequence[int], *prompts: Sequence[int], **fields: Any) -> policy_pb2.GenerateRequest:
    """With `seeds` in the place of `sampling.seed`."""
    asked = request(*prompts, seeds=seeds, **fields)
    asked.sampling.ClearField("seed")
    return asked


def endless(request_id: str = "") -> policy_pb2.GenerateRequest:
    """As long as the context allows: some hundred milliseconds."""
    return request([5], new=1000, request_id=request_id)


@in_loop
async def test_generates_k_completions_of_every_prompt_in_order(folder: Path) -> None:
    async with service(folder) as it:
        answer = await it.generate(request([5, 6], [7, 8, 9], sampling={"completions": 3}))
    completions = [from_completion(completion) for completion in answer.completions]
    assert [(c.prompt_index, c.completion_index, c.seed) for c in completions] == [
        (p, k, 3 + k) for p in range(2) for k in range(3)
    ]
    assert all(len(c.token_ids) == len(c.logprobs) == 6 for c in completions)  # type: ignore[arg-type]
    assert completions[0].token_ids.tolist() != completions[1].token_ids.tolist()
    assert {span.version.run_id for c in completions for span in c.versions} == {""}
    assert from_tensor(answer.prompts[1].token_ids, "p").tolist() == [7, 8, 9]
    assert (answer.sampling.temperature, answer.sampling.top_p, answer.stopping.max_new_tokens) == (1.0, 1.0, 6)
    assert answer.request_id


@in_loop
async def test_without_a_seed_equal_prompts_differ_and_can_be_repeated(folder: Path) -> None:
    asked = request([5, 6], [5, 6], new=12)
    asked.sampling.ClearField("seed")
    async with service(folder) as it:
        first, second = await it.completions(asked)
        again = await it.completions(request([5, 6], new=12, sampling={"seed": second.seed}))
    assert first.token_ids.tolist() != second.token_ids.tolist()
    assert again[0].token_ids.tolist() == second.token_ids.tolist()


@in_loop
async def test_prompts_of_one_call_have_seeds_of_their_own(folder: Path) -> None:
    seeds, prompts = (9, 2**64 - 1, 9), ([5, 6], [5, 6], [7, 8, 9])
    async with service(folder) as it:
        together = await it.generate(seeded(seeds, *prompts, new=12, sampling={"completions": 2}))
        alone = [
            completion
            for seed, prompt in zip(seeds, prompts, strict=True)
            for completion in await it.completions(request(prompt, new=12, sampling={"seed": seed, "completions": 2}))
        ]
    completions = [from_completion(completion) for completion in together.completions]
    assert [c.seed for c in completions] == [9, 10, 2**64 - 1, 0, 9, 10]
    assert together.sampling.seed == 9
    assert [c.token_ids.tolist() for c in completions] == [c.token_ids.tolist() for c in alone]
    assert len({tuple(c.token_ids.tolist()) for c in completions}) == 6


@in_loop
async def test_the_largest_seed_is_drawn_and_counted_on_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request([5, 6], new=2, sampling={"completions": 2})
    asked.sampling.ClearField("seed")
    monkeypatch.setattr(requests.secrets, "randbelow", lambda bound: bound - 1)
    async with service(folder) as it:
        answer = await it.generate(asked)
    assert answer.sampling.seed == 2**64 - 1
    assert [completion.seed for completion in answer.completions] == [2**64 - 1, 0]


@in_loop
async def test_text_and_chat_are_tokenized(folder: Path, tmp_path: Path) -> None:
    tokenizer_file = tiny_lm_folder(tmp_path / "chat")
    (tokenizer_file / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    asked = request(new=2)
    asked.prompts.add(text="A fine film")
    asked.prompts.add().chat.messages.add(role="user", content="A fine film")
    async with service(tokenizer_file) as it:
        answer = await it.generate(asked)
    for prompt in answer.prompts:
        assert from_tensor(prompt.token_ids, "p").tolist() == tiny_tokenizer()("A fine film").input_ids
    async with service(folder) as it:
        with pytest.raises(errors.InputError, match="chat template"):
            await it.generate(asked)


@in_loop
async def test_a_stream_gives_every_token_and_then_the_completion(folder: Path) -> None:
    asked = request([5, 6], sampling={"completions": 2})
    async with service(folder) as it:
        events = [event async for event in stream(it.policy.GenerateStream, asked, timeout_s=20)]
        whole = await it.completions(asked)
    for k in range(2):
        mine = [event for event in events if event.completion_index == k]
        assert [event.WhichOneof("event") for event in mine] == ["token"] * 6 + ["finished"]
        assert [event.token.token_id for event in mine[:-1]] == whole[k].token_ids.tolist()
        assert [event.token.logprob for event in mine[:-1]] == pytest.approx(whole[k].logprobs.tolist(), abs=1e-5)
        assert from_completion(mine[-1].finished).token_ids.tolist() == whole[k].token_ids.tolist()


@in_loop
async def test_a_client_that_goes_away_in_mid_stream_is_noticed_by_nobody_else(folder: Path) -> None:
    other = request([9, 10, 11], new=50)
    async with service(folder) as it:
        alone = await it.completions(other)
        going = it.policy.GenerateStream(endless(), timeout=20)
        await going.read()
        staying = asyncio.create_task(it.completions(other))
        going.cancel()
        assert (await staying)[0].token_ids.tolist() == alone[0].token_ids.tolist()
        await it.until_load(0)


@in_loop
async def test_cancelled_and_expired_calls_leave_at_once(folder: Path) -> None:
    async with service(folder, step_s=0.05, max_sequences=1) as it:
        waiting = [asyncio.create_task(it.generate(endless())) for _ in range(3)]
        await it.until_load(1, 2)
        with pytest.raises(errors.DeadlineExceeded):
            await it.generate(endless(), timeout_s=0.1)
        for task in waiting:
            task.cancel()
        began = time.monotonic()
        await it.until_load(0)
        assert time.monotonic() - began < 1, "sixty steps of 0.05 s are left to each"


@in_loop
async def test_one_request_id_is_generated_once(folder: Path) -> None:
    asked = request([5], new=40, request_id="r-1")
    asked.sampling.ClearField("seed")
    async with service(folder) as it:
        first = asyncio.create_task(it.generate(asked))
        second = asyncio.create_task(it.generate(asked))
        answers = [await first, await second, await it.generate(asked)]
        assert answers[0] == answers[1] == answers[2]
        replay = [event async for event in stream(it.policy.GenerateStream, asked, timeout_s=20)]
        assert [event.finished for event in replay] == list(answers[0].completions)
        with pytest.raises(errors.RequestError, match="r-1 was used for another request"):
            await it.generate(request([6], request_id="r-1"))


@in_loop
async def test_an_answer_is_kept_for_a_while_only(folder: Path) -> None:
    asked = request([5], new=12, request_id="r-1")
    asked.sampling.ClearField("seed")
    async with service(folder, answer_cache_s=0.05) as it:
        first = await it.generate(asked)
        await asyncio.sleep(0.1)
        assert (await it.generate(asked)).completions[0].seed != first.completions[0].seed


@in_loop
async def test_a_caller_that_leaves_does_not_end_it_for_one_that_attached(folder: Path) -> None:
    async with service(folder, step_s=0.02) as it:
        submit, submitted = it.engine.submit, []
        it.engine.submit = lambda requests: (submitted.append(len(requests)), submit(requests))[1]  # type: ignore
        first = asyncio.create_task(it.generate(endless("r-1")))
        await it.until_load(1)
        second = asyncio.create_task(it.generate(endless("r-1")))
        await asyncio.sleep(0.1)
        first.cancel()
        assert len((await second).completions) == 1
        assert submitted == [1], "the channel tries again what the server gave up"
        assert await it.load() == (0, 0)


@in_loop
async def test_a_full_line_is_overloaded_with_a_time_to_come_back(folder: Path) -> None:
    async with service(folder, step_s=0.05, max_sequences=1, max_waiting_sequences=2) as it:
        tasks = [asyncio.create_task(it.generate(endless()))]
        await it.until_load(1)
        tasks += [asyncio.create_task(it.generate(endless())) for _ in range(2)]
        await it.until_load(1, 2)
        refused = await asyncio.to_thread(refusal, it.server.address)
        for task in tasks:
            task.cancel()
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2 sequences waiting" in refused.details()
    assert int(dict(refused.trailing_metadata())["grpc-retry-pushback-ms"]) > 0


def refusal(address: str) -> Any:
    """What a client without retries is told."""
    with grpc.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            policy_pb2_grpc.PolicyServiceStub(channel).Generate(endless(), timeout=5)
        return refused.value


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        (request([5, 280]), errors.RequestError, "token 280"),
        (request([-1]), errors.RequestError, "token -1"),
        (request([]), errors.RequestError, "empty"),
        (request(list(range(2, 72))), errors.RequestError, "70 tokens and the model's context is 64"),
        (request([5] * 64), errors.RequestError, "64 tokens and the model's context is 64"),
        (request(), errors.RequestError, "prompts: 1 to 4 expected"),
        (request(*[[5]] * 5), errors.RequestError, "5 received"),
        (request([5], tokenizer_sha256="f" * 64), errors.TokenizerMismatch, "another|tokenizer"),
        (request([5], sampling={"temperature": -1}), errors.RequestError, "temperature"),
        (request([5], sampling={"top_p": 1.5}), errors.RequestError, "top_p"),
        (request([5], new=2000), errors.RequestError, "2000 is more than this service allows, 1024"),
        (request([5], logprob_mode=9), errors.RequestError, "logprob_mode"),
        (request([5], sampling={"completions": 2000}), errors.RequestError, "2000 completions"),
        (
            policy_pb2.GenerateRequest(prompts=[policy_pb2.Prompt(text="")]),
            errors.InputError,
            "no tokens",
        ),
        (seeded([1, 2, 3], [5], [6]), errors.RequestError, "seeds: one for each prompt, 2, expected, 3 received"),
        (request([5], [6], seeds=[1, 2]), errors.RequestError, "seeds: 2 received beside sampling.seed 3"),
        (policy_pb2.GenerateRequest(prompts=[policy_pb2.Prompt()]), errors.RequestError, "none received"),
    ],
)
@in_loop
async def test_bad_input_is_refused_with_a_sentence(
    folder: Path, asked: policy_pb2.GenerateRequest, error: type[Exception], said: str
) -> None:
    async with service(folder, max_prompts_per_call=4) as it:
        with pytest.raises(error, match=said):
            await it.generate(asked)
        assert len(await it.completions(request([5]))) == 1


@in_loop
async def test_a_response_is_cut_to_the_context(folder: Path) -> None:
    async with service(folder) as it:
        answer = await it.completions(request([5] * 60, new=50))
    assert (len(answer[0].token_ids), answer[0].finish_reason) == (4, FinishReason.LENGTH)


def publish(place: Path, seed: int = 1, step: int = 1) -> WeightVersion:
    return write_weights(place, tiny_lm(seed=seed), run_id="r", epoch=0, step=step, tokenizer_sha256=OWN)


@in_loop
async def test_weights_are_prepared_committed_and_rolled_back(folder: Path, tmp_path: Path) -> None:
    new = publish(tmp_path / "0-1")
    wanted = policy_pb2.WeightRequirement(at_least=to_version(new))
    async with service(folder) as it:
        before = await it.completions(request([5, 6]))
        old = before[0].versions[0].version
        with pytest.raises(errors.WeightsMismatch, match="or newer are asked for"):
            await it.generate(request([5, 6], weights=wanted))
        prepare = weights_pb2.PrepareRequest(version=to_version(new), uri=(tmp_path / "0-1").as_uri())
        await call(it.weights.Prepare, prepare, timeout_s=20)
        held = await call(it.weights.Current, weights_pb2.CurrentRequest(), timeout_s=5)
        assert (from_version(held.current), from_version(held.prepared)) == (old, new)
        assert not held.HasField("previous")
        with pytest.raises(errors.WeightsMismatch, match="expected to be current"):
            await it.commit(new, expected=new)
        committed = await it.commit(new, expected=old)
        assert (from_version(committed.current), from_version(committed.previous)) == (new, old)
        after = await it.completions(request([5, 6], weights=wanted))
        assert after[0].versions[0].version == new
        assert after[0].token_ids.tolist() != before[0].token_ids.tolist()
        await call(it.weights.Rollback, weights_pb2.RollbackRequest(), timeout_s=20)
        again = await it.completions(request([5, 6]))
        assert again[0].token_ids.tolist() == before[0].token_ids.tolist()


@in_loop
async def test_a_change_goes_on_alone_though_its_caller_has_left(folder: Path, tmp_path: Path) -> None:
    first, second = publish(tmp_path / "0-1"), publish(tmp_path / "0-2", seed=2, step=2)
    async with service(folder) as it:
        prepare, log, go_on = it.engine.prepare, [], threading.Event()

        def slowly(place: Path, version: WeightVersion, timeout_s: float) -> None:
            log.append(f"{version.step} begins")
            go_on.wait(20)
            prepare(place, version, timeout_s)
            log.append(f"{version.step} is done")

        it.engine.prepare = slowly  # type: ignore[method-assign]
        with pytest.raises(errors.DeadlineExceeded):
            await it.prepare(tmp_path / "0-1", first, timeout_s=0.2)
        with pytest.raises(errors.DeadlineExceeded):
            await it.prepare(tmp_path / "0-2", second, timeout_s=0.2)
        later = [asyncio.create_task(it.commit(first)), asyncio.create_task(it.prepare(tmp_path / "0-2", second))]
        await asyncio.sleep(0.2)
        assert log == ["1 begins"], "one at a time, and who left while waiting takes the change along"
        assert not any(task.done() for task in later)
        go_on.set()
        await asyncio.gather(*later)
        assert log == ["1 begins", "1 is done", "2 begins", "2 is done"]
        assert it.engine.versions == Versions(first, None, second)


@in_loop
async def test_weights_can_be_uploaded(folder: Path, tmp_path: Path) -> None:
    new = publish(tmp_path / "0-1")
    data = (tmp_path / "0-1" / WEIGHTS_FILE).read_bytes()
    empty_uri = weights_pb2.PrepareRequest(version=to_version(new))
    async with service(folder) as it:
        with pytest.raises(errors.RequestError, match="not uploaded"):
            await call(it.weights.Prepare, empty_uri, timeout_s=5)
        with pytest.raises(errors.ModelError, match="altered"):
            await it.upload(new, data[:-1] + bytes([data[-1] ^ 1]))
        await it.upload(new, data)
        await call(it.weights.Prepare, empty_uri, timeout_s=5)
        await it.commit(new)
        assert (await it.completions(request([5])))[0].versions[0].version == new


@in_loop
async def test_an_adapter_can_be_uploaded_with_what_it_is_for(folder: Path, tmp_path: Path) -> None:
    model = load_causal_lm(folder)
    add_adapter(model, LoraSettings(rank=4), weights_sha256(folder), 0)
    with torch.no_grad():
        for tensor in named_weights(model).values():
            tensor.add_(0.5)
    new = write_weights(tmp_path / "0-1", model, run_id="r", epoch=0, step=1, tokenizer_sha256=OWN)
    data = (tmp_path / "0-1" / WEIGHTS_FILE).read_bytes()
    async with service(folder) as it:
        with pytest.raises(errors.ModelError, match="do not fit"):
            await it.upload(new, data)
        with pytest.raises(errors.ModelError, match="the adapter is for the model with sha256 abc"):
            await it.upload(new, data, weights_pb2.Adapter(base_sha256="abc", scaling=4))
        await it.upload(new, data, weights_pb2.Adapter(base_sha256=weights_sha256(folder), scaling=4))
        await it.commit(new)
        assert (await it.completions(request([5])))[0].versions[0].version == new
        held, ordinary = named_weights(it.engine._current.model), named_weights(merged(model))
        assert all(held[name].equal(ordinary[name]) for name in held)


@in_loop
async def test_an_upload_is_bounded_by_the_weights_own_size_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    version = WeightVersion("r", 0, 1, "a" * 64)
    own_bytes = sum(tensor.nbytes for tensor in named_weights(tiny_lm()).values())
    largest = 2 * own_bytes + 2**20
    async with service(folder) as it:
        with pytest.raises(errors.RequestError, match=f"more than {largest} bytes"):
            await it.upload(version, bytes(largest + 1))
        with pytest.raises(errors.ModelError, match="altered"):
            await it.upload(version, bytes(largest))
        began = asyncio.Event()

        async def chunks() -> AsyncIterator[weights_pb2.UploadChunk]:
            yield weights_pb2.UploadChunk(version=to_version(version), data=b"some")
            began.set()
            await asyncio.sleep(20)

        leaving = asyncio.create_task(call(it.weights.Upload, chunks(), timeout_s=20))
        await began.wait()
        async with asyncio.timeout(10):
            while not os.listdir(tmp_path):  # noqa: ASYNC110 (a folder does not tell)
                await asyncio.sleep(0.01)
            leaving.cancel()
            while os.listdir(tmp_path):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@in_loop
async def test_a_flipped_byte_is_refused_and_serving_goes_on(folder: Path, tmp_path: Path) -> None:
    new = publish(tmp_path / "0-1")
    file = tmp_path / "0-1" / WEIGHTS_FILE
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    prepare = weights_pb2.PrepareRequest(version=to_version(new), uri=str(tmp_path / "0-1"))
    async with service(folder) as it:
        before = await it.completions(request([5, 6]))
        with pytest.raises(errors.ModelError, match="altered"):
            await call(it.weights.Prepare, prepare, timeout_s=20)
        with pytest.raises(errors.WeightsMismatch, match="not prepared"):
            await it.commit(new)
        assert (await it.completions(request([5, 6])))[0].token_ids.tolist() == before[0].token_ids.tolist()


@in_loop
async def test_an_engine_that_fails_ends_the_process_and_its_calls(folder: Path) -> None:
    async with service(folder, step_s=0.02) as it:
        waiting = asyncio.create_task(call(it.policy.Generate, endless(), timeout_s=5))
        await it.until_load(1)
        it.engine._current.model.register_forward_pre_hook(broken)
        with pytest.raises(errors.RlhfError, match=r"engine failed.*broken"):
            await it.server.wait_for_failure()
        with pytest.raises(errors.TransientError):
            await waiting


def broken(*_: Any) -> None:
    raise RuntimeError("broken")


@in_loop
async def test_health_info_and_reflection(folder: Path) -> None:
    async with service(folder) as it:
        async with connect(it.server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
            for name in ("", POLICY, WEIGHTS):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        info = await call(it.policy.Info, policy_pb2.PolicyInfoRequest(), timeout_s=5)
        assert (info.model_type, info.vocab_size, info.max_context_tokens) == ("llama", 280, 64)
        assert info.tokenizer_sha256 == OWN
        answer = await asyncio.to_thread(reflected, it.server.address)
        assert len(answer["completions"]) == 1
        assert answer["completions"][0]["finish_reason"] == "FINISH_REASON_LENGTH"


def reflected(address: str) -> dict[str, Any]:
    with connect_sync(address) as channel:
        asked = json_format.MessageToDict(request([5, 6]), preserving_proto_field_name=True)
        return ReflectedService(channel, POLICY).call("Generate", asked)


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    policy = PolicySettings(model=tmp_path / "nowhere")
    with pytest.raises(errors.ModelError, match="no such model folder"):
        run_server("policy", policy, SERVICES, starting(Settings(policy=policy)))
