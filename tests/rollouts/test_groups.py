"""Which tasks go into one call, and under which id."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf.queues.streams import Delivery
from rlhf.rollouts.groups import Group, InHand, grouped
from rlhf.rollouts.services import generate_request
from rlhf.wire.records import PromptTask, Sampling, Stopping, WeightVersion

VERSION = WeightVersion("run", 1, 2, "ab" * 32)


def task(index: int = 0, **changes: Any) -> PromptTask:
    values: dict[str, Any] = {
        "rollout_id": f"run/{index}/0",
        "run_id": "run",
        "prompt_index": index,
        "attempt": 0,
        "token_ids": np.array([1, 2, 3], dtype=np.int32),
        "text": "a prompt",
        "metadata": {},
        "sampling": Sampling(temperature=0.5, seed=index),
        "stopping": Stopping(max_new_tokens=8),
        "at_least": VERSION,
        "tokenizer_sha256": "cd" * 32,
    }
    return PromptTask(**{**values, **changes})


def indices(groups: list[Group]) -> list[list[int]]:
    return [[prompt.task.prompt_index for prompt in group.prompts] for group in groups]


def in_hand(*tasks: PromptTask) -> list[InHand]:
    return [InHand(Delivery(f"{n}-0", one.rollout_id, b"", False, "worker", {}), one) for n, one in enumerate(tasks)]


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [(0, 8, []), (1, 8, [1]), (8, 8, [8]), (9, 8, [4, 5]), (20, 8, [6, 7, 7]), (3, 1, [1, 1, 1])],
)
def test_few_groups_of_equal_size_in_order(count: int, most: int, sizes: list[int]) -> None:
    groups = indices(grouped(in_hand(*map(task, range(count))), most))
    assert [len(group) for group in groups] == sizes
    assert [index for group in groups for index in group] == list(range(count))


@pytest.mark.parametrize(("completions", "sizes"), [(8, [8, 8]), (16, [4] * 4), (64, [1] * 16), (65, [1] * 16)])
def test_many_completions_make_smaller_groups(completions: int, sizes: list[int]) -> None:
    sampling = Sampling(seed=1, completions=completions)
    groups = grouped(in_hand(*(task(index, sampling=sampling) for index in range(16))), 8)
    assert [len(group.prompts) for group in groups] == sizes


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "other"},
        {"sampling": Sampling(temperature=0.7, seed=0)},
        {"sampling": Sampling(temperature=0.5, seed=0, completions=2)},
        {"sampling": Sampling(temperature=0.5, seed=None)},
        {"stopping": Stopping(max_new_tokens=9)},
        {"stopping": Stopping(max_new_tokens=8, stop_strings=("end",))},
        {"at_least": replace(VERSION, step=3)},
        {"at_least": None},
        {"tokenizer_sha256": "ef" * 32},
        {"ref_hidden_states": True},
    ],
    ids=str,
)
def test_tasks_that_no_call_can_hold_together_are_not_mixed(changes: dict[str, Any]) -> None:
    tasks = [task(0), task(1, **changes), task(2), task(3, **changes)]
    assert indices(grouped(in_hand(*tasks), 8)) == [[0, 2], [1, 3]]


def test_tasks_may_differ_in_all_that_a_call_has_for_each() -> None:
    other = task(1, token_ids=np.array([9], np.int32), text="x", metadata={"a": "b"}, attempt=2)
    assert indices(grouped(in_hand(task(0), other), 8)) == [[0, 1]]


def test_the_same_tasks_ask_under_the_same_id() -> None:
    assert generate_request([task(0), task(1)]) == generate_request([task(0), task(1)])


def test_other_tasks_ask_under_another_id() -> None:
    unseeded = [task(index, sampling=Sampling(seed=None)) for index in range(3)]
    calls = [
        [task(0)],
        [task(1)],
        [task(0), task(1)],
        [task(1), task(0)],
        [task(0), task(2)],
        [task(0), task(1, token_ids=np.array([9], np.int32))],
        [task(0, at_least=None), task(1, at_least=None)],
        [task(0, attempt=1, rollout_id="run/0/1"), task(1)],
        # Equal in all but whose they are: one answer must not do for two.
        *([one] for one in unseeded),
        [unseeded[0], unseeded[1]],
        [unseeded[0], unseeded[2]],
    ]
    ids = [generate_request(call).request_id for call in calls]
    assert len(set(ids)) == len(calls)


def test_seeds_are_each_prompt_s_or_the_policy_s() -> None:
    seeded = generate_request([task(5), task(6)])
    assert (list(seeded.seeds), seeded.sampling.HasField("seed")) == ([5, 6], False)
    drawn = generate_request([task(index, sampling=Sampling(seed=None)) for index in range(2)])
    assert (list(drawn.seeds), drawn.sampling.HasField("seed")) == ([], False)
