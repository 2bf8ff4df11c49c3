"""Publishing to real policy replicas, and what they say and do afterwards."""

import asyncio
from concurrent import futures
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest

from rlhf.models.tokenizer import tokenizer_sha256
from rlhf.policy.server import POLICY, SERVICES, load_engine, serving
from rlhf.policy.settings import PolicySettings
from rlhf.ppo.agreement import LOGPROB_BOUNDS
from rlhf.ppo.learner import Learner
from rlhf.ppo.probe import TOKENS, probe
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.ppo.publish import Publisher
from rlhf.ppo.settings import CriticSettings, KlSettings, PpoSettings
from rlhf.ppo.watched import probed
from rlhf.queues.connection import open_client
from rlhf.queues.registry import Replica, open_registry
from rlhf.serving.server import running
from rlhf.settings.run import Settings
from rlhf.v1 import weights_pb2, weights_pb2_grpc
from rlhf.wire.messages import to_version
from support.rollouts import version
from support.tiny import tiny_lm, tiny_lm_folder, tiny_tokenizer

OWN = tokenizer_sha256(tiny_tokenizer())
BOUND = LOGPROB_BOUNDS["float32"]
PROMPT = EncodedPrompt("A fine", {}, np.array([5, 6, 7], np.int32))


@pytest.fixture
def publisher(tmp_path, embedded_redis, redis_settings, run_name):
    registry = open_registry(open_client(embedded_redis, redis_settings), run_name, redis_settings)
    return Publisher(registry, tmp_path / "weights", OWN, PpoSettings(publish_timeout_s=10.0))


@asynccontextmanager
async def replica(publisher, folder):
    """The engine of a policy service that is registered as policy-0."""
    settings = PolicySettings(model=folder)
    engine, codec = load_engine(Settings(policy=settings))

    @asynccontextmanager
    async def start(server):
        async with serving(server, engine, codec, settings):
            await server.set_ready(POLICY, True)
            yield

    async with running("policy", settings, SERVICES, start) as server:
        register(publisher, "policy-0", server.address)
        yield engine


def register(publisher, name, address):
    publisher.registry.register(Replica(name, address, version(0), None, True))


def ask(publisher, published, temperature=0.7):
    return probe(publisher.channels(), PROMPT, published, temperature=temperature, tokenizer_sha256=OWN, timeout_s=10.0)


def learner_of(policy, temperature=0.7):
    return Learner(policy, None, PpoSettings(), CriticSettings(), KlSettings(), temperature=temperature, pad_id=1)


def published_and_probed(publisher, folder, trained, before_probe=lambda engine: None):
    """What the one replica said to hold, and its answer to the probe."""

    async def run():
        async with replica(publisher, folder) as engine:
            published = await asyncio.to_thread(publisher.publish, trained, "r", 0, 1)
            assert publisher.held == {"policy-0": published}
            before_probe(engine)
            return await asyncio.to_thread(ask, publisher, published)

    return asyncio.run(run())["policy-0"]


def test_a_replica_that_generates_with_what_was_published(publisher, tmp_path):
    trained = tiny_lm(seed=4)
    answer = published_and_probed(publisher, tiny_lm_folder(tmp_path / "start"), trained)
    assert answer.completions[0].response_mask.sum() == TOKENS
    assert probed("policy-0", answer, learner_of(trained)).within(BOUND)
    assert not probed("policy-0", answer, learner_of(trained, temperature=1.0)).within(BOUND)


def test_a_replica_that_claims_weights_it_does_not_generate_with(publisher, tmp_path):
    def keep_the_old(engine):
        engine._current.model.load_state_dict(tiny_lm().state_dict())

    trained = tiny_lm(seed=4)
    answer = published_and_probed(publisher, tiny_lm_folder(tmp_path / "start"), trained, keep_the_old)
    assert not probed("policy-0", answer, learner_of(trained)).within(BOUND)
    assert probed("policy-0", answer, learner_of(tiny_lm())).within(BOUND)


class Stubborn(weights_pb2_grpc.WeightsServiceServicer):
    """Agrees to everything, and stays where it was."""

    def Prepare(self, request, context):
        return weights_pb2.PrepareResponse(prepared=request.version)

    def Commit(self, request, context):
        return weights_pb2.CommitResponse(current=request.version)

    def Current(self, request, context):
        return weights_pb2.CurrentResponse(current=to_version(version(0)))


def test_a_replica_that_stays_behind_is_seen_and_one_that_is_away_is_not_judged(publisher):
    server = grpc.server(futures.ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(Stubborn(), server)
    server.start()
    register(publisher, "policy-0", f"127.0.0.1:{port}")
    register(publisher, "policy-1", "127.0.0.1:1")
    try:
        publisher.settings = PpoSettings(publish_timeout_s=2.0)
        published = publisher.publish(tiny_lm(), "r", 0, 1)
    finally:
        server.stop(None).wait(5)
    assert publisher.held == {"policy-0": version(0)}
    assert published.step == 1
