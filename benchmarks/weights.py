"""What do new weights cost: how long does decoding pause, and how soon do all replicas serve them?

- gap: 16 sequences stream from a `rlhf policy` process without a break. Now and then new weights of the same size are
  prepared and committed. The gap is the longest time between two tokens of one sequence of those that wait for a token
  while the Commit call runs, in decode steps: the median time between two tokens of a sequence while nothing changes.
  The same longest time at a Commit of what is current already, which changes nothing, stands beside it, and the extra
  gap is the difference.
- publish: the trainer's own publisher, to two replicas of a run, from the end of an optimiser step until both have
  answered Commit: file, Prepare, pointer in Redis, Commit. Idle replicas, and ones that are busy with 64 calls. The
  whole policy; and an adapter on every linear layer, which the replicas merge with the model they started on.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import PreTrainedModel

from harness.bench import Figure, Measured, Options, interleaved, main, percentile, say, scratch
from harness.load import SERVICE, TIMEOUT_S, closed_loop, message
from harness.model import Ask, asks, make_model
from harness.servers import Served, policy_service
from rlhf.models.adapters import add_adapter
from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.models.tokenizer import load_tokenizer, tokenizer_sha256
from rlhf.models.weights import read_manifest, write_weights
from rlhf.ppo.publish import Publisher
from rlhf.ppo.settings import LoraSettings, PpoSettings
from rlhf.queues.connection import open_client
from rlhf.queues.keys import RunKeys
from rlhf.queues.registry import Registry
from rlhf.queues.settings import RedisSettings
from rlhf.serving.client import call, call_sync, connect, connect_sync, stream
from rlhf.supervisor.embedded_redis import EmbeddedRedis
from rlhf.v1 import policy_pb2, policy_pb2_grpc, weights_pb2, weights_pb2_grpc
from rlhf.wire.messages import from_version, to_version
from rlhf.wire.records import WeightVersion

THREADS = 1
STREAMS = 16
RUN = "bench"
LORA = LoraSettings(rank=8, target_modules="all-linear")
IN_FLIGHT = {
    "none": weights_pb2.IN_FLIGHT_WAIT,
    "wait": weights_pb2.IN_FLIGHT_WAIT,
    "keep": weights_pb2.IN_FLIGHT_KEEP,
}
"""By kind of commit; "none" commits what is current already."""
SETTLE_S, QUICK_SETTLE_S = 1.0, 0.5
"""Around every change, so that its tokens belong to it alone: sequences that go on with new weights wait longest, for
their caches to be computed again."""


def measure(options: Options) -> Measured:
    torch.set_num_threads(THREADS)
    with scratch() as folder:
        parameters = make_model(folder / "model", quick=options.quick)
        rounds, settle_s = options.size(20, 1), QUICK_SETTLE_S if options.quick else SETTLE_S
        figures = _gap_figures(asyncio.run(_watch_gaps(folder, rounds, settle_s)), settle_s)
        figures += _publish(options, folder)
    setup = {
        "parameters": parameters,
        "streams": STREAMS,
        "rounds": rounds,
        "replicas": 2,
        "adapter's rank": LORA.rank,
        "dtype": "float32",
        "seed": 0,
    }
    return Measured(figures, setup, {"each policy": THREADS, "trainer": THREADS})


@dataclass
class _Seen:
    """What the streams and the changes left, on one clock."""

    intervals: list[tuple[float, float]] = field(default_factory=list)
    """Two consecutive tokens of one sequence."""
    moments: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Begin and end of each Commit call, by kind."""
    prepares: list[tuple[float, float]] = field(default_factory=list)


async def _watch_gaps(folder: Path, rounds: int, settle_s: float) -> _Seen:
    seen = _Seen(moments={"none": [], "wait": [], "keep": []})
    versions = iter(_write_versions(folder, 2 * rounds))
    with policy_service(folder / "model", folder / "policy.log", threads=THREADS) as policy:
        async with connect(policy.address, service=SERVICE) as channel, connect(policy.address) as control:
            stub, weights = policy_pb2_grpc.PolicyServiceStub(channel), weights_pb2_grpc.WeightsServiceStub(control)
            tasks = [asyncio.create_task(_stream_on(stub, number, seen)) for number in range(STREAMS)]
            await asyncio.sleep(2 * settle_s)
            for number in range(1, rounds + 1):
                say(f"  {number}/{rounds} none, wait, keep")
                for kind in seen.moments:
                    await _one_moment(kind, weights, versions, seen, settle_s)
            await asyncio.sleep(settle_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return seen


async def _one_moment(
    kind: str,
    weights: weights_pb2_grpc.WeightsServiceAsyncStub,
    versions: Iterator[tuple[Path, WeightVersion]],
    seen: _Seen,
    settle_s: float,
) -> None:
    await asyncio.sleep(settle_s)
    version = (await call(weights.Current, weights_pb2.CurrentRequest(), timeout_s=TIMEOUT_S)).current
    if kind != "none":
        folder, new = next(versions)
        version = to_version(new)
        began_s = time.perf_counter()
        await call(
            weights.Prepare, weights_pb2.PrepareRequest(version=version, uri=folder.as_uri()), timeout_s=TIMEOUT_S
        )
        seen.prepares.append((began_s, time.perf_counter()))
        await asyncio.sleep(settle_s)
    commit = weights_pb2.CommitRequest(version=version, in_flight=IN_FLIGHT[kind])
    began_s = time.perf_counter()
    await call(weights.Commit, commit, timeout_s=TIMEOUT_S)
    seen.moments[kind].append((began_s, time.perf_counter()))


async def _stream_on(stub: policy_pb2_grpc.PolicyServiceAsyncStub, number: int, seen: _Seen) -> None:
    """One sequence after the other, each of another length, so that they end at different times."""
    for length in range(64 + 8 * number, 10**6, 8):
        prompt = asks(1, vocab_size=300, seed=number)[0].prompt
        request = message(Ask(prompt, 64 + length % 128, number))
        last_s: float | None = None
        async for event in stream(stub.GenerateStream, request, timeout_s=TIMEOUT_S):
            now_s = time.perf_counter()
            if event.HasField("token"):
                if last_s is not None:
                    seen.intervals.append((last_s, now_s))
                last_s = now_s


def _write_versions(folder: Path, count: int) -> list[tuple[Path, WeightVersion]]:
    model, hash_of_tokenizer = load_causal_lm(folder / "model"), tokenizer_sha256(load_tokenizer(folder / "model"))
    found = []
    for step in range(1, count + 1):
        place = folder / "versions" / f"0-{step}"
        found.append(
            (place, write_weights(place, model, run_id=RUN, epoch=0, step=step, tokenizer_sha256=hash_of_tokenizer))
        )
    return found


def _gap_figures(seen: _Seen, settle_s: float) -> list[Figure]:
    changes = [span for spans in seen.moments.values() for span in spans] + seen.prepares
    quiet = [b - a for a, b in seen.intervals if not any(a < e + settle_s and b > s - 0.1 for s, e in changes)]
    step_s = statistics.median(quiet or [b - a for a, b in seen.intervals])
    gaps = {kind: [_longest(seen.intervals, span) / step_s for span in spans] for kind, spans in seen.moments.items()}
    control = statistics.median(gaps["none"])
    wait, keep = ([gap - control for gap in gaps[kind]] for kind in ("wait", "keep"))
    after = [_typical(seen.intervals, end, end + settle_s) / step_s for _, end in seen.moments["wait"]]
    preparing = [_longest(seen.intervals, span) / step_s for span in seen.prepares]
    return [
        Figure("decode step, 16 streams", "ms", [1000 * step_s], headline=True),
        Figure("decode step p99, nothing changes", "steps", [percentile(quiet or [step_s], 0.99) / step_s]),
        Figure("longest wait for a token, Commit that changes nothing", "steps", gaps["none"]),
        Figure("longest wait for a token, Commit of new weights", "steps", gaps["wait"]),
        Figure("extra gap of a commit, sequences finish on old weights", "steps", wait, at_most=1, headline=True),
        Figure("extra gap of a commit, sequences continue on new weights", "steps", keep, headline=True),
        Figure("decode step while old and new weights both run", "steps", after),
        Figure("longest wait for a token during Prepare", "steps", preparing, headline=True),
        Figure("Prepare under load", "s", [end - begin for begin, end in seen.prepares]),
        Figure("Commit under load", "s", [end - begin for begin, end in seen.moments["wait"]]),
    ]


def _longest(intervals: Sequence[tuple[float, float]], span: tuple[float, float]) -> float:
    """Of those that overlap the span."""
    return max(b - a for a, b in intervals if a <= span[1] and b >= span[0])


def _typical(intervals: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    return statistics.median(b - a for a, b in intervals if begin <= a and b <= end)


def _publish(options: Options, folder: Path) -> list[Figure]:
    model, adapted = load_causal_lm(folder / "model"), load_causal_lm(folder / "model")
    add_adapter(adapted, LORA, weights_sha256(folder / "model"), seed=0)
    with _run_of_two(folder) as (replicas, publisher):
        steps = iter(range(1, 10**6))

        def publish(policy: PreTrainedModel = model) -> float:
            began_s = time.perf_counter()
            version = publisher.publish(policy, RUN, 0, next(steps))
            seconds = time.perf_counter() - began_s
            for replica in replicas:
                assert _current(replica) == version
            return seconds

        def write() -> float:
            began_s = time.perf_counter()
            write_weights(folder / "alone", model, run_id=RUN, epoch=0, step=0, tokenizer_sha256="")
            return time.perf_counter() - began_s

        def publish_adapter() -> float:
            return publish(adapted)

        # The first time replicas build their second model, and read the base again.
        publish(), publish_adapter()
        sizes = [read_manifest(path).size_bytes for path in sorted((folder / "weights").iterdir())]
        ways = {"publish, idle": publish, "adapter, idle": publish_adapter}
        idle = interleaved({"write alone": write, **ways}, options.size(10, 2))
        with _busy(replicas, folder, options):
            busy = interleaved({"publish, busy": publish, "adapter, busy": publish_adapter}, options.size(10, 2))
    return [
        Figure("new weights on 2 replicas, idle", "s", idle["publish, idle"], headline=True),
        Figure("new weights on 2 replicas, 64 calls in flight", "s", busy["publish, busy"], headline=True),
        Figure("of which: writing the file", "s", idle["write alone"]),
        Figure("bytes of them", "MiB", [sizes[0] / 2**20]),
        Figure("a new adapter on 2 replicas, idle", "s", idle["adapter, idle"], headline=True),
        Figure("a new adapter on 2 replicas, 64 calls in flight", "s", busy["adapter, busy"]),
        Figure("bytes of an adapter", "MiB", [sizes[1] / 2**20], headline=True),
    ]


@contextmanager
def _run_of_two(folder: Path) -> Iterator[tuple[list[Served], Publisher]]:
    redis = EmbeddedRedis(folder / "redis")
    settings = RedisSettings(url=redis.start())
    try:
        with ExitStack() as stack:
            replicas = []
            for number in range(2):
                own = {"policy.join_run": "true", "policy.name": f"policy-{number}", "run.name": RUN}
                log = folder / f"joined-{number}.log"
                joined = policy_service(
                    folder / "model", log, threads=THREADS, settings={**own, "redis.url": settings.url}
                )
                replicas.append(stack.enter_context(joined))
            registry = Registry(open_client(settings.url, settings), RunKeys(RUN), settings.lease_s)
            hash_of_tokenizer = tokenizer_sha256(load_tokenizer(folder / "model"))
            yield replicas, Publisher(registry, folder / "weights", hash_of_tokenizer, PpoSettings())
    finally:
        redis.stop()


@contextmanager
def _busy(replicas: Sequence[Served], folder: Path, options: Options) -> Iterator[None]:
    """64 calls in flight, from a process of their own, for as long as the block lasts."""
    addresses = ",".join(replica.address for replica in replicas)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        stop = folder / "enough"
        load = pool.submit(_keep_busy, addresses, stop, options.size(64, 4))
        try:
            for replica in replicas:
                _wait_for_calls(replica)
            yield
        finally:
            stop.touch()
            load.result(TIMEOUT_S)


def _wait_for_calls(replica: Served) -> None:
    """
    Raises:
        RuntimeError: none comes.
    """
    with connect_sync(replica.address) as channel:
        stub, until_s = policy_pb2_grpc.PolicyServiceStub(channel), time.monotonic() + TIMEOUT_S
        while not call_sync(stub.Info, policy_pb2.PolicyInfoRequest(), timeout_s=TIMEOUT_S).running:
            if time.monotonic() > until_s:
                raise RuntimeError(f"{replica.address}: no call came within {TIMEOUT_S:g} s")
            time.sleep(0.05)


def _keep_busy(addresses: str, stop: Path, in_flight: int) -> None:
    seed = 0
    while not stop.exists():
        seed += 1
        closed_loop(addresses, asks(2 * in_flight, vocab_size=300, seed=seed), in_flight)


def _current(replica: Served) -> WeightVersion:
    with connect_sync(replica.address) as channel:
        stub = weights_pb2_grpc.WeightsServiceStub(channel)
        return from_version(call_sync(stub.Current, weights_pb2.CurrentRequest(), timeout_s=TIMEOUT_S).current)


if __name__ == "__main__":
    main("weights", "How long do new weights pause decoding, and how soon do all replicas serve them?", measure)
