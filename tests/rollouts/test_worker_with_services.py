"""Everything a rollout passes on its way, as in a run: Redis, policy, reward and reference, with tiny models."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from rlhf.models.causal import weights_sha256
from rlhf.models.tokenizer import tokenizer_sha256
from rlhf.policy.server import SERVICES as POLICY_SERVICES
from rlhf.policy.server import starting as policy
from rlhf.policy.settings import PolicySettings
from rlhf.queues.connection import open_client
from rlhf.queues.registry import open_registry
from rlhf.queues.settings import RedisSettings
from rlhf.queues.streams import Queue, prompts_queue, rollouts_queue
from rlhf.reference.server import SERVICE as REFERENCE_SERVICE
from rlhf.reference.server import starting as reference
from rlhf.reference.settings import ReferenceSettings
from rlhf.reward.server import SERVICE as REWARD_SERVICE
from rlhf.reward.server import starting as reward
from rlhf.reward.settings import RewardSettings
from rlhf.rollouts.services import Services
from rlhf.rollouts.settings import RolloutsSettings
from rlhf.rollouts.worker import Worker
from rlhf.serving.server import running
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from rlhf.v1 import rollout_pb2
from rlhf.wire.messages import from_rollout, to_prompt_task
from rlhf.wire.records import PromptTask, Rollout, Sampling, Stopping
from support.tiny import tiny_lm_folder, tiny_reward_folder, tiny_tokenizer

PROMPTS = ("A fine film with", "The plot was", "I liked it!", "Avoid this")


@pytest.fixture
def settings(tmp_path: Path, redis_settings: RedisSettings, run_name: str) -> Settings:
    folder = tiny_lm_folder(tmp_path / "lm")
    return Settings(
        run=RunSettings(name=run_name, folder=tmp_path),
        redis=redis_settings,
        policy=PolicySettings(model=folder),
        reference=ReferenceSettings(model=folder),
        reward=RewardSettings(model=tiny_reward_folder(tmp_path / "rm")),
    )


def add_prompts(prompts: Queue, run: str, temperature: float) -> None:
    tokenizer = tiny_tokenizer()
    for index, text in enumerate(PROMPTS):
        task = PromptTask(
            rollout_id=f"{run}/{index}/0",
            run_id=run,
            prompt_index=index,
            attempt=0,
            token_ids=np.array(tokenizer(text).input_ids, dtype=np.int32),
            text=text,
            metadata={},
            sampling=Sampling(temperature=temperature, seed=100 * index, completions=4),
            stopping=Stopping(max_new_tokens=12),
            at_least=None,
            tokenizer_sha256=tokenizer_sha256(tokenizer),
        )
        prompts.enqueue(task.rollout_id, to_prompt_task(task).SerializeToString())


async def roll_out(settings: Settings, temperature: float) -> list[Rollout]:
    client = open_client(settings.redis.url, settings.redis)
    prompts = prompts_queue(client, settings.run.name, settings.redis)
    rollouts = rollouts_queue(client, settings.run.name, settings.redis)
    add_prompts(prompts, settings.run.name, temperature)
    async with AsyncExitStack() as stack:
        addresses = {}
        for name, section, services, start in (
            ("policy", settings.policy, POLICY_SERVICES, policy(settings)),
            ("reward", settings.reward, [REWARD_SERVICE], reward(settings)),
            ("reference", settings.reference, [REFERENCE_SERVICE], reference(settings)),
        ):
            server = await stack.enter_async_context(running(name, section, services, start))
            addresses[name] = server.address
        connected = await stack.enter_async_context(Services.connected(RolloutsSettings(**addresses)))
        registry = open_registry(client, settings.run.name, settings.redis)
        worker = Worker(settings, connected, prompts, rollouts, registry)
        work = asyncio.create_task(worker.work())
        found: list[Rollout] = []
        async with asyncio.timeout(60):
            while len(found) < len(PROMPTS):
                for delivery in await asyncio.to_thread(rollouts.consume, "trainer", 8, 0.5):
                    found.append(from_rollout(rollout_pb2.Rollout.FromString(delivery.payload)))
        worker.stopped.set()
        await work
    assert prompts.depth().entries == 0
    client.close()
    return sorted(found, key=lambda rollout: rollout.prompt_index)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_and_reference_of_one_model_agree_on_every_log_prob(settings: Settings, temperature: float) -> None:
    rollouts = asyncio.run(roll_out(settings, temperature))
    assert [rollout.prompt for rollout in rollouts] == list(PROMPTS)
    for rollout in rollouts:
        assert len(rollout.completions) == 4
        assert rollout.reference_sha256 == weights_sha256(settings.reference.model or "")
        assert rollout.reward_sha256 == weights_sha256(settings.reward.model or "")
        for completion in rollout.completions:
            mask = completion.response_mask
            assert 1 <= mask.sum() <= 12
            np.testing.assert_allclose(completion.logprobs[mask], completion.ref_logprobs[mask], atol=1e-4)
    scores = [completion.score for rollout in rollouts for completion in rollout.completions]
    assert len(set(scores)) > 8


def test_prompts_that_share_calls_become_the_rollouts_that_they_become_alone(settings: Settings) -> None:
    made = {}
    for prompts_per_call in (1, 4):
        own = {
            "run": settings.run.model_copy(update={"name": f"{settings.run.name}-{prompts_per_call}"}),
            "rollouts": RolloutsSettings(prompts_per_call=prompts_per_call),
        }
        made[prompts_per_call] = asyncio.run(roll_out(settings.model_copy(update=own), 0.7))
    for alone, together in zip(made[1], made[4], strict=True):
        assert (alone.prompt_index, alone.prompt, alone.sampling) == (
            together.prompt_index,
            together.prompt,
            together.sampling,
        )
        for one, other in zip(alone.completions, together.completions, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert (one.seed, one.text, one.finish_reason) == (other.seed, other.text, other.finish_reason)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
            np.testing.assert_allclose(one.ref_logprobs, other.ref_logprobs, atol=1e-5)
            np.testing.assert_allclose(one.score, other.score, atol=1e-5)


def test_the_process_stops_on_sigterm(settings: Settings, tmp_path: Path) -> None:
    client = open_client(settings.redis.url, settings.redis)
    registry = open_registry(client, settings.run.name, settings.redis)
    overrides = (f"redis.url={settings.redis.url}", f"run.name={settings.run.name}", f"run.folder={tmp_path}")
    command = [sys.executable, "-m", "rlhf.cli.main", "rollouts", "--consumer", "worker-3"]
    command += [part for override in overrides for part in ("--set", override)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not any(beat.name == "worker-3" for beat in registry.beats()):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
    client.close()
