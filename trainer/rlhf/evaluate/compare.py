"""`rlhf evaluate`: the initial and the improved policy on the same held-out prompts, with the same random numbers.

Figures, of which `<name>_interval` is the 95 % bootstrap interval [low, high] over prompts:

    reward_before, reward_after, reward_gain    mean reward; the gain is paired. After rounds of feedback by the reward
                                                model in service at the end, both policies by the same
    first_reward_before, _after, _gain          the same by the one that PPO began with, where another is in service
    judge_before, judge_after, judge_gain       mean score of the judge; the gain is paired
    judge_heldout_accuracy                      of a judge that was fitted; None for a rule
    kl                                          nats per completion, KL(after ‖ before), estimated from after's samples
    response_tokens_before, _after              mean length, the end token included
    ended_before, _after                        share of the responses that the policy ended itself
    distinct_bigrams_before, _after             number of different word pairs
    distinct_bigram_share_before, _after        their share of all; see `rlhf.evaluate.statistics`
    prompts                                     number of pairs

With `--frontier` also those of `rlhf.evaluate.frontier`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.data.prompts import read_prompts
from rlhf.data.sampling import sampling_of
from rlhf.evaluate import frontier
from rlhf.evaluate.judge import Judge, load_judge
from rlhf.evaluate.policies import Answer, Policy, load_both
from rlhf.evaluate.results import Evaluation, Pair, write_evaluation
from rlhf.evaluate.scoring import Rewards, Scores, load_first_rewards, load_rewards, logprob_sums, score_items
from rlhf.evaluate.statistics import bigrams, bootstrap_interval
from rlhf.models.compute import set_threads
from rlhf.models.folders import start_model
from rlhf.observe.progress import progress
from rlhf.settings.run import Settings

_log = logging.getLogger(__name__)


def run(settings: Settings) -> Mapping[str, Any]:
    """Writes the evaluation and returns its figures.

    Raises:
        InputError: prompts, a model folder, the judge's texts or a rule cannot be used.
    """
    evaluate, paths = settings.evaluate, settings.paths
    set_threads(evaluate.threads)
    prompts = read_prompts(evaluate.prompts or paths.heldout_prompts, evaluate.limit)
    folders = evaluate.before or start_model(settings), evaluate.after or paths.policy
    before, after = load_both(*folders, evaluate.device, evaluate.dtype)
    judge = load_judge(evaluate.judge or paths.labelled, evaluate.seed)
    rewards, rewards_name = load_rewards(settings)
    sampling, stopping = sampling_of(settings.sampling, completions=1, seed=evaluate.seed)

    with progress("evaluate", total=2 * len(prompts), unit="completions") as bar:
        answers_before = before.answer(prompts, sampling, stopping, bar.advance)
        answers_after = after.answer(prompts, sampling, stopping, bar.advance)
    kl = _kl(after, before, answers_after, sampling.temperature)
    pairs = _pairs(answers_before, answers_after, rewards, judge, kl)

    figures = figures_of(pairs, evaluate.seed) | {"judge_heldout_accuracy": judge.heldout_accuracy}
    if (first := load_first_rewards(settings)) is not None:
        figures |= _by_first(first.score(answers_before), first.score(answers_after), evaluate.seed)
    evaluation = Evaluation(
        before=str(folders[0]),
        after=str(folders[1]),
        reward=rewards_name,
        judge=judge.name,
        sampling=settings.sampling.model_dump(mode="json"),
        seed=evaluate.seed,
        figures=figures,
        pairs=tuple(pairs),
    )
    write_evaluation(paths.evaluation, evaluation)
    _log.info("wrote %d pairs to %s", len(pairs), paths.evaluation)
    if evaluate.frontier:
        given = frontier.Given(settings, prompts, before, *folders, rewards, rewards_name, judge)
        figures |= frontier.run(given)
    return figures


def figures_of(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    """What the module's docstring lists, but for the judge's own accuracy."""
    columns = {name: np.array([getattr(pair, name) for pair in pairs]) for name in _MEASURED}
    for name in ("reward", "judge"):
        columns[f"{name}_gain"] = columns[f"{name}_after"] - columns[f"{name}_before"]
    return {
        "prompts": len(pairs),
        **{name: float(values.mean()) for name, values in columns.items()},
        **{f"{name}_interval": list(bootstrap_interval(columns[name], seed)) for name in _WITH_INTERVAL},
        **_variety("before", [pair.before for pair in pairs]),
        **_variety("after", [pair.after for pair in pairs]),
    }


def _by_first(before: Scores, after: Scores, seed: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, values in (("before", before), ("after", after), ("gain", after - before)):
        figures[f"first_reward_{name}"] = float(values.mean())
        figures[f"first_reward_{name}_interval"] = list(bootstrap_interval(values, seed))
    return figures


def _variety(when: str, texts: Sequence[str]) -> dict[str, float]:
    found = bigrams(texts)
    return {f"distinct_bigrams_{when}": found.distinct, f"distinct_bigram_share_{when}": found.distinct_share}


_MEASURED = (
    *("reward_before", "reward_after", "judge_before", "judge_after", "kl"),
    *("response_tokens_before", "response_tokens_after", "ended_before", "ended_after"),
)
_WITH_INTERVAL = (
    *("reward_before", "reward_after", "reward_gain"),
    *("judge_before", "judge_after", "judge_gain"),
    "kl",
)


def _kl(after: Policy, before: Policy, answers: Sequence[Answer], temperature: float) -> Scores:
    """[N]: the k1 estimate of KL(after ‖ before) of each answer, summed over its tokens."""
    return logprob_sums(after.as_reference(), answers, temperature) - logprob_sums(
        before.as_reference(), answers, temperature
    )


def _pairs(before: Sequence[Answer], after: Sequence[Answer], rewards: Rewards, judge: Judge, kl: Scores) -> list[Pair]:
    rewards_of = rewards.score(before), rewards.score(after)
    judged = judge.judge(score_items(before)), judge.judge(score_items(after))
    return [
        Pair(
            prompt=first.prompt.text,
            before=first.text,
            after=second.text,
            reward_before=float(rewards_of[0][n]),
            reward_after=float(rewards_of[1][n]),
            judge_before=float(judged[0][n]),
            judge_after=float(judged[1][n]),
            kl=float(kl[n]),
            response_tokens_before=len(first.response_ids),
            response_tokens_after=len(second.response_ids),
            ended_before=first.ended,
            ended_after=second.ended,
        )
        for n, (first, second) in enumerate(zip(before, after, strict=True))
    ]
