"""Generate calls under way and just answered, by request id: the same id is generated once, however often it is asked.

    first call     its sequences are submitted
    same id later  attaches to what is running, or gets the answer that is kept for a while
    a caller goes  if it was the last one, the sequences leave the engine at once

Lives on the event loop; the engine is reached through its thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator

from rlhf.errors import RequestError, Unavailable
from rlhf.policy.engine import SEEDS, Engine, Event, Failed, Finished, GenerationRequest, TokenSampled
from rlhf.policy.engine_thread import EngineThread
from rlhf.policy.requests import GenerateCall
from rlhf.v1 import policy_pb2
from rlhf.wire.messages import to_completion, to_sampling, to_stopping
from rlhf.wire.records import Completion
from rlhf.wire.tensors import to_tensor

log = logging.getLogger(__name__)

MAX_KEPT_BYTES = 64 * 2**20

GenerateEvents = AsyncIterator[policy_pb2.GenerateEvent]


class Calls:
    def __init__(self, answer_cache_s: float) -> None:
        self._answer_cache_s = answer_cache_s
        self._running: dict[str, _Running] = {}
        self._by_sequence: dict[int, _Running] = {}
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._ids = itertools.count()
        self._engine: Engine | None = None
        self._thread: EngineThread | None = None

    def serve(self, engine: Engine, thread: EngineThread) -> None:
        """From now on calls go to this engine."""
        self._engine, self._thread = engine, thread

    async def answer(self, call: GenerateCall, content: bytes) -> policy_pb2.GenerateResponse:
        """
        Args:
            content: the request's bytes, by which a repetition is told from another request with the same id.

        Raises:
            RlhfError: what made a sequence fail, or why the call was not taken.
        """
        if kept := self._kept_answer(call, content):
            return kept.response
        running = await self._attach(call, content, stream=False)
        try:
            # Shielded: a caller that goes away must not end it for others that wait.
            return await asyncio.shield(running.done)
        finally:
            self._detach(running)

    async def events(self, call: GenerateCall, content: bytes) -> GenerateEvents:
        """As `answer`, token by token. One that attaches hears what it missed first."""
        if kept := self._kept_answer(call, content):
            for completion in kept.response.completions:
                yield _finished_event(completion)
            return
        running = await self._attach(call, content, stream=True)
        try:
            seen = 0
            while seen < len(running.events) or not running.done.done():
                if seen == len(running.events):
                    await running.changed()
                    continue
                yield running.events[seen]
                seen += 1
            await running.done
        finally:
            self._detach(running)

    def deliver(self, events: list[Event]) -> None:
        """Takes the events of one step."""
        for event in events:
            running = self._by_sequence.get(event.id)
            if running is None:  # its callers went away during the step
                continue
            if isinstance(event, TokenSampled):
                running.token(event)
            elif isinstance(event, Failed):
                self._settle(running, event.error)
            else:
                del self._by_sequence[event.id]
                running.finish(event)
                if running.complete:
                    self._settle(running, None)

    def fail(self, error: BaseException) -> None:
        """The engine is gone: nothing that runs will finish."""
        for running in list(self._running.values()):
            self._settle(running, Unavailable(f"the policy's engine failed ({error}); its log has the traceback"))

    async def _attach(self, call: GenerateCall, content: bytes, *, stream: bool) -> _Running:
        running = self._running.get(call.request_id)
        if running is not None:
            _check_same(call.request_id, running.content, content)
            running.callers += 1
            return running
        running = _Running(call, content, [next(self._ids) for _ in range(_count(call))])
        self._running[call.request_id] = running
        self._by_sequence.update(dict.fromkeys(running.ids, running))
        assert self._engine is not None
        assert self._thread is not None
        try:
            await self._thread.run(self._engine.submit, running.requests(stream))
        except BaseException as error:
            self._settle(running, error if isinstance(error, Exception) else Unavailable("the first caller went away"))
            raise
        return running

    def _detach(self, running: _Running) -> None:
        running.callers -= 1
        if running.callers == 0 and not running.done.done():
            self._settle(running, Unavailable("every caller went away"))

    def _settle(self, running: _Running, error: BaseException | None) -> None:
        """Ends a call, with its answer or with an error; an error is not kept, so that the id may be tried again."""
        if running.done.done():
            return
        self._running.pop(running.call.request_id, None)
        left = [id for id in running.ids if self._by_sequence.pop(id, None) is not None]
        if left:
            assert self._engine is not None
            assert self._thread is not None
            self._thread.post(self._engine.abort, left)
        if error is None:
            response = running.response()
            self._keep(running, response)
            running.done.set_result(response)
        else:
            running.done.set_exception(error)
            running.done.exception()  # asked for once, or asyncio warns where no caller is left to ask
        running.wake()

    def _keep(self, running: _Running, response: policy_pb2.GenerateResponse) -> None:
        if not running.call.named:
            return
        kept = _Kept(response, running.content, time.monotonic())
        self._kept[running.call.request_id] = kept
        self._kept_bytes += kept.size_bytes
        while self._kept_bytes > MAX_KEPT_BYTES:
            self._drop_oldest()

    def _kept_answer(self, call: GenerateCall, content: bytes) -> _Kept | None:
        now = time.monotonic()
        while self._kept and now - next(iter(self._kept.values())).since_s > self._answer_cache_s:
            self._drop_oldest()
        kept = self._kept.get(call.request_id)
        if kept is not None:
            _check_same(call.request_id, kept.content, content)
        return kept

    def _drop_oldest(self) -> None:
        _, kept = self._kept.popitem(last=False)
        self._kept_bytes -= kept.size_bytes


class _Kept:
    def __init__(self, response: policy_pb2.GenerateResponse, content: bytes, since_s: float) -> None:
        self.response = response
        self.content = content
        self.since_s = since_s
        self.size_bytes = response.ByteSize() + len(content)


class _Running:
    """One call: its sequences, what they have given so far, and who waits for it."""

    def __init__(self, call: GenerateCall, content: bytes, ids: list[int]) -> None:
        self.call = call
        self.content = content
        self.ids = ids
        self.callers = 1
        self.events: list[policy_pb2.GenerateEvent] = []
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[policy_pb2.GenerateResponse] = loop.create_future()
        self._place = {id: divmod(n, call.sampling.completions) for n, id in enumerate(ids)}
        self._completions: dict[int, policy_pb2.Completion] = {}
        self._changed = asyncio.Event()

    @property
    def complete(self) -> bool:
        return len(self._completions) == len(self.ids)

    def requests(self, stream: bool) -> list[GenerationRequest]:
        call = self.call
        return [
            GenerationRequest(
                id,
                call.prompts[prompt],
                self._seed(prompt, completion),
                call.sampling,
                call.stopping,
                call.logprob_mode,
                call.requirement,
                stream,
            )
            for id, (prompt, completion) in self._place.items()
        ]

    def token(self, event: TokenSampled) -> None:
        prompt, completion = self._place[event.id]
        token = policy_pb2.Token(token_id=event.token_id, logprob=event.logprob, text=event.text)
        self._add(policy_pb2.GenerateEvent(prompt_index=prompt, completion_index=completion, token=token))

    def finish(self, event: Finished) -> None:
        prompt, completion = self._place[event.id]
        record = Completion(
            prompt_index=prompt,
            completion_index=completion,
            token_ids=event.token_ids,
            logprobs=event.logprobs,
            logprob_mode=self.call.logprob_mode,
            text=event.text,
            finish_reason=event.finish_reason,
            stopped_by=event.stopped_by,
            versions=event.versions,
            seed=self._seed(prompt, completion),
        )
        self._completions[event.id] = to_completion(record)
        self._add(_finished_event(self._completions[event.id]))

    def response(self) -> policy_pb2.GenerateResponse:
        return policy_pb2.GenerateResponse(
            request_id=self.call.request_id,
            prompts=[policy_pb2.PromptInfo(token_ids=to_tensor(prompt)) for prompt in self.call.prompts],
            completions=[self._completions[id] for id in self.ids],
            sampling=to_sampling(self.call.sampling),
            stopping=to_stopping(self.call.stopping),
        )

    async def changed(self) -> None:
        """Until there is another event, or the end."""
        await self._changed.wait()

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _add(self, event: policy_pb2.GenerateEvent) -> None:
        self.events.append(event)
        self.wake()

    def _seed(self, prompt: int, completion: int) -> int:
        return (self.call.seeds[prompt] + completion) % SEEDS


def _finished_event(completion: policy_pb2.Completion) -> policy_pb2.GenerateEvent:
    return policy_pb2.GenerateEvent(
        prompt_index=completion.prompt_index, completion_index=completion.completion_index, finished=completion
    )


def _count(call: GenerateCall) -> int:
    return len(call.prompts) * call.sampling.completions


def _check_same(request_id: str, content: bytes, other: bytes) -> None:
    if content != other:
        raise RequestError(f"request_id: {request_id} was used for another request; choose a new one")
