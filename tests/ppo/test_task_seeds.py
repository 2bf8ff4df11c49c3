"""Which seed a prompt is sampled with: its own, and in a deterministic run the same however often it is sent."""

import numpy as np
import pytest

from rlhf.ppo.ledger import Issue
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.ppo.source import TaskMaker
from rlhf.wire.records import Sampling, Stopping
from support.rollouts import version


@pytest.fixture
def seed():
    def of(index, attempt, **options):
        maker = TaskMaker(
            [EncodedPrompt("A fine", {}, np.array([5, 6], np.int32))],
            run_id="run-1",
            seed=3,
            sampling=Sampling(),
            stopping=Stopping(max_new_tokens=4),
            tokenizer_sha256="",
            **options,
        )
        return maker.task(Issue(index, attempt), f"run-1/{index}/{attempt}", version(0)).sampling.seed

    return of


def test_another_attempt_has_another_seed(seed):
    assert len({seed(0, 0), seed(0, 1), seed(1, 0)}) == 3


def test_in_a_deterministic_run_it_has_the_same(seed):
    assert seed(0, 0, seed_of_attempt=False) == seed(0, 2, seed_of_attempt=False) == seed(0, 0)
    assert seed(1, 0, seed_of_attempt=False) != seed(0, 0)
