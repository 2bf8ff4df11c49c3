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
import torch

from rlhf.models.causal import load_causal_lm, weights_sha256
from rlhf.models.output_layer import output_layer
from rlhf.models.tokenizer import tokenizer_sha256
from rlhf.policy.server import SERVICES as POLICY_SERVICES
from rlhf.policy.server import starting as policy
from rlhf.policy.settings import PolicySettings
from rlhf.ppo.settings import ShapingSettings
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
from rlhf.wire.blobs import read_blob
from rlhf.wire.messages import from_rollout, to_prompt_task
from rlhf.wire.records import Blob, PromptTask, Rollout, Sampling, Stopping
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


def add_prompts(prompts: Queue, run: str, temperature: float, ref_hidden_states: bool) -> None:
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
            ref_hidden_states=ref_hidden_states,
        )
        prompts.enqueue(task.rollout_id, to_prompt_task(task).SerializeToString())


async def roll_out(settings: Settings, temperature: float, ref_hidden_states: bool = False) -> list[Rollout]:
    client = open_client(settings.redis.url, settings.redis)
    prompts = prompts_queue(client, settings.run.name, settings.redis)
    rollouts = rollouts_queue(client, settings.run.name, settings.redis)
    add_prompts(prompts, settings.run.name, temperature, ref_hidden_states)
    async with AsyncExitStack() as stack:
        addresses = {}
        for name, section, services, start in (
            ("policy", settings.policy, POLICY_SERVICES, policy(settings)),
            ("reward", settings.reward, [REWARD_SERVICE], reward(settings)),
            ("reference", settings.reference, [REFERENCE_SERVICE], reference(settings)),
        ):
            server = await stack.enter_async_context(running(name, section, services, start))
            addresses[name] = server.address
        connected = await stack.enter_async_context(Services.connected(RolloutsSettings(**addresses), settings.shaping))
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
            assert completion.ref_logprobs is not None
            np.testing.assert_allclose(completion.logprobs[mask], completion.ref_logprobs[mask], atol=1e-4)
            assert completion.ref_hidden is None
    scores = [completion.score for rollout in rollouts for completion in rollout.completions]
    assert len(set(scores)) > 8


def test_a_completion_is_scored_up_to_where_it_is_truncated_and_learned_from_whole(
    settings: Settings, tmp_path: Path
) -> None:
    """The rule answers with what it read; the policy's tokens, log-probs and text stay."""
    rule = tmp_path / "length.py"
    rule.write_text("def length(items):\n    return [float(len(item.completion)) for item in items]\n")
    shaping = ShapingSettings(truncate_at="e", truncate_after=2)
    reward = RewardSettings(rule=f"{rule}:length")
    rollouts = asyncio.run(roll_out(settings.model_copy(update={"shaping": shaping, "reward": reward}), 1.0))
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    assert [one.score for one in completions] == [len(shaping.scored(one.text)) for one in completions]
    cut = [one for one in completions if shaping.truncates(one.text)]
    assert 0 < len(cut) < len(completions)
    assert any(one.score < len(one.text) for one in cut)


def test_a_reward_model_reads_truncated_text(settings: Settings) -> None:
    scores = {}
    # Both as text, because the tokens of a text are not always those that were sampled.
    for name, end in (("whole", "nowhere in there"), ("cut", "e")):
        shaping = ShapingSettings(truncate_at=end)
        own = settings.run.model_copy(update={"name": f"{settings.run.name}-{name}"})
        rollouts = asyncio.run(roll_out(settings.model_copy(update={"shaping": shaping, "run": own}), 1.0))
        scores[name] = {one.text: one.score for rollout in rollouts for one in rollout.completions}
    assert scores["whole"].keys() == scores["cut"].keys()
    differing = [text for text, score in scores["whole"].items() if abs(score - scores["cut"][text]) > 1e-3]
    assert differing
    assert all("e" in text for text in differing)


def test_hidden_states_arrive_from_which_the_log_probs_follow(settings: Settings) -> None:
    """Longer completions' as blobs, shorter ones' in the rollout."""
    inline_bytes = 6 * 16 * 4
    reference = settings.reference.model_copy(update={"inline_bytes": inline_bytes})
    settings = settings.model_copy(update={"reference": reference})
    rollouts = asyncio.run(roll_out(settings, 0.7, ref_hidden_states=True))
    layer = output_layer(load_causal_lm(settings.reference.model or ""))
    kinds = set()
    for completion in (one for rollout in rollouts for one in rollout.completions):
        mask, hidden = completion.response_mask, completion.ref_hidden
        assert completion.ref_logprobs is None
        assert hidden is not None
        kinds.add(type(hidden.content))
        data = hidden.content if isinstance(hidden.content, bytes) else read_blob(settings.paths.blobs, hidden.content)
        states = torch.frombuffer(bytearray(data), dtype=torch.float32).view(hidden.shape)
        log_p = torch.log_softmax(states @ layer.weight.detach().T / 0.7, -1).numpy()
        found = log_p[np.arange(mask.sum()), completion.token_ids[mask]]
        np.testing.assert_allclose(found, completion.logprobs[mask], atol=1e-4)
    assert kinds == {bytes, Blob}


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
            assert one.ref_logprobs is not None
            assert other.ref_logprobs is not None
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
