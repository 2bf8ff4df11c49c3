"""The work of policy, reward and reference service in one process and one thread: no messages, no queues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf.models.causal import load_causal_lm
from rlhf.models.tokenizer import load_tokenizer
from rlhf.policy.continuous import ContinuousEngine, Limits
from rlhf.policy.engine import Finished, GenerationRequest
from rlhf.reference.requests import Item
from rlhf.reference.scorer import ReferenceModel
from rlhf.reward.head import RewardHead
from rlhf.reward.requests import TokenItem
from rlhf.wire.records import PromptTask, WeightVersion


class OneProcess:
    """
    Args:
        policy: folder of the model that generates, and of the reference.
        reward: folder of the reward model.
    """

    def __init__(self, policy: Path, reward: Path, *, threads: int, max_sequences: int) -> None:
        self._reference = ReferenceModel.load(policy, "cpu", "float32", threads)
        self._reward = RewardHead.load(reward, "cpu", "float32", threads)
        limits = Limits(max_sequences=max_sequences)
        version = WeightVersion("", 0, 0, "")
        self._engine = ContinuousEngine(load_causal_lm(policy), load_tokenizer(policy), version, limits)

    def roll_out(self, tasks: Sequence[PromptTask]) -> int:
        """Generates, scores and refers one completion of each task; returns the tokens of prompts and responses."""
        self._engine.submit([_request(number, task) for number, task in enumerate(tasks)])
        finished: list[Finished] = []
        while len(finished) < len(tasks):
            finished += [event for event in self._engine.step() if isinstance(event, Finished)]
        sequences = [np.concatenate([tasks[one.id].token_ids, one.token_ids]) for one in finished]
        prompts = [len(tasks[one.id].token_ids) for one in finished]
        readings = [TokenItem(ids, prompt) for ids, prompt in zip(sequences, prompts, strict=True)]
        self._reward.forward([self._reward.reading(item) for item in readings])
        temperature = tasks[0].sampling.temperature
        self._reference.forward(
            [Item(ids, prompt, temperature) for ids, prompt in zip(sequences, prompts, strict=True)]
        )
        return sum(map(len, sequences))


def _request(number: int, task: PromptTask) -> GenerationRequest:
    assert task.sampling.seed is not None
    return GenerationRequest(
        number, task.token_ids, task.sampling.seed, replace(task.sampling, completions=1), task.stopping
    )
