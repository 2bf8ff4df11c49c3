"""`rlhf evaluate` on tiny random policies: the figures against their definitions, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlhf.data.prompts import Prompt
from rlhf.data.rows import write_rows
from rlhf.errors import ModelError, TokenizerMismatch
from rlhf.evaluate.compare import run
from rlhf.evaluate.policies import Answer, Policy
from rlhf.evaluate.results import Evaluation, read_evaluation
from rlhf.evaluate.settings import EvaluateSettings
from rlhf.models.causal import save_model
from rlhf.policy.settings import SamplingSettings
from rlhf.reward.exchange import Pointer, write_pointer
from rlhf.reward.settings import RewardSettings
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from rlhf.wire.records import Sampling, Stopping
from support.tiny import tiny_adapted_folder, tiny_lm, tiny_lm_folder, tiny_reward_folder, tiny_tokenizer

RULE = "def letters(items):\n    return [len(set(item.completion)) + len(item.tokens) / 100 for item in items]\n"
PROMPTS = ["The film", "I saw", "A fine", "The plot of this", "It was", "Avoid"]
TEMPERATURE = 0.7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two policies, prompts, a reward model and a rule."""
    run_folder = tmp_path / "runs" / "run"
    tiny_lm_folder(run_folder / "pretrained", seed=0)
    tiny_lm_folder(run_folder / "policy", seed=1)
    tiny_reward_folder(run_folder / "reward-model", seed=2)
    write_rows(run_folder / "data" / "heldout_prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    (tmp_path / "rule.py").write_text(RULE)
    return tmp_path


def settings(folder: Path, **evaluate: Any) -> Settings:
    return Settings(
        run=RunSettings(folder=folder / "runs"),
        sampling=SamplingSettings(temperature=TEMPERATURE, max_new_tokens=8),
        evaluate=EvaluateSettings(**{"judge": f"{folder / 'rule.py'}:letters"} | evaluate),
    )


def evaluated(chosen: Settings) -> tuple[dict[str, Any], Evaluation]:
    return dict(run(chosen)), read_evaluation(chosen.paths.evaluation)


def test_figures_are_the_means_of_the_pairs(folder: Path) -> None:
    figures, evaluation = evaluated(settings(folder))
    pairs = evaluation.pairs
    assert [pair.prompt for pair in pairs] == PROMPTS
    assert figures == evaluation.figures
    assert figures["prompts"] == len(PROMPTS)
    for name in ("reward_before", "reward_after", "judge_before", "judge_after", "kl", "response_tokens_after"):
        assert figures[name] == pytest.approx(np.mean([getattr(pair, name) for pair in pairs])), name
    for name in ("reward", "judge"):
        assert figures[f"{name}_gain"] == pytest.approx(figures[f"{name}_after"] - figures[f"{name}_before"])
        low, high = figures[f"{name}_gain_interval"]
        assert low < figures[f"{name}_gain"] < high
    assert figures["ended_after"] == np.mean([pair.ended_after for pair in pairs])
    assert figures["judge_heldout_accuracy"] is None
    assert {pair.before for pair in pairs} != {pair.after for pair in pairs}
    json.dumps(figures, allow_nan=False)


def test_kl_is_the_log_prob_difference_of_afters_tokens(folder: Path) -> None:
    """Against a plain log-softmax of each answer by itself, without padding."""
    chosen = settings(folder)
    _, evaluation = evaluated(chosen)
    after, before = (Policy.load(chosen.paths.folder / name, "cpu", "float32") for name in ("policy", "pretrained"))
    prompts = [Prompt(text, None, {}) for text in PROMPTS]
    sampling = Sampling(temperature=TEMPERATURE, seed=chosen.evaluate.seed)
    answers = after.answer(prompts, sampling, Stopping(max_new_tokens=8))
    for pair, answer in zip(evaluation.pairs, answers, strict=True):
        assert pair.after == answer.text
        expected = naive_logprob(after, answer) - naive_logprob(before, answer)
        assert pair.kl == pytest.approx(expected, abs=1e-4)


def naive_logprob(policy: Policy, answer: Answer) -> float:
    with torch.no_grad():
        logits = policy.model(torch.tensor([answer.token_ids.tolist()])).logits[0]
    log_p, start = torch.log_softmax(logits / TEMPERATURE, -1), len(answer.prompt_ids)
    return sum(log_p[start - 1 + t, token].item() for t, token in enumerate(answer.response_ids))


def test_a_policy_compared_with_itself_has_not_changed(folder: Path) -> None:
    figures, evaluation = evaluated(settings(folder, after=folder / "runs" / "run" / "pretrained"))
    assert all(pair.before == pair.after for pair in evaluation.pairs)
    assert figures["kl"] == 0
    assert figures["judge_gain_interval"] == figures["reward_gain_interval"] == [0, 0]


def test_the_seed_decides_the_answers(folder: Path) -> None:
    first, again, other = (evaluated(settings(folder, seed=seed))[1] for seed in (1, 1, 2))
    assert first == again
    assert first.pairs != other.pairs


def test_limit_takes_the_first_prompts(folder: Path) -> None:
    figures, evaluation = evaluated(settings(folder, limit=2))
    assert [pair.prompt for pair in evaluation.pairs] == PROMPTS[:2]
    assert figures["prompts"] == 2


def test_a_rule_can_reward(folder: Path) -> None:
    _, evaluation = evaluated(settings(folder, reward_rule=f"{folder / 'rule.py'}:letters"))
    assert all(pair.reward_after == pair.judge_after for pair in evaluation.pairs)
    for pair in evaluation.pairs:
        assert pair.judge_after == pytest.approx(len(set(pair.after)) + pair.response_tokens_after / 100)


def test_after_rounds_of_feedback_both_policies_are_scored_by_the_model_in_service_and_by_the_first(
    folder: Path,
) -> None:
    chosen = settings(folder)
    first, _ = evaluated(chosen)
    assert not [name for name in first if name.startswith("first_")]
    refreshed = chosen.paths.rounds / "1" / "reward-model"
    tiny_reward_folder(refreshed, seed=7)
    # The run's folder has been moved since: what counts is the round.
    write_pointer(chosen.paths.reward_in_service, Pointer("/elsewhere/reward-model", "sha256", 1))
    both, evaluation = evaluated(chosen)
    alone, _ = evaluated(settings(folder, reward_model=refreshed))
    assert evaluation.reward == str(refreshed)
    for name in ("reward_before", "reward_after", "reward_gain"):
        assert both[name] == alone[name] != first[name]
        assert both[f"first_{name}"] == first[name]
        assert both[f"first_{name}_interval"] == first[f"{name}_interval"]
    assert not [name for name in alone if name.startswith("first_")]

    own = folder / "own-reward-model"
    shutil.move(chosen.paths.reward_model, own)
    began = chosen.model_copy(update={"reward": RewardSettings(model=own)})
    assert evaluated(began)[0] == both, "PPO may have begun with a model of another folder"
    chosen.paths.reward_in_service.unlink()
    assert evaluated(began)[0] == first, "and without rounds gone on with it"


def test_an_ensemble_s_members_are_taken_together_as_ppo_has_them(folder: Path) -> None:
    tiny_adapted_folder(folder / "runs" / "run" / "reward-model")

    def rewards(**reward: Any) -> list[float]:
        chosen = settings(folder).model_copy(update={"reward": RewardSettings(**reward)})
        return [pair.reward_after for pair in evaluated(chosen)[1].pairs]

    mean, worst = rewards(), rewards(aggregation="worst")
    assert np.abs(np.subtract(mean, worst)).max() > 0.01
    assert rewards(aggregation="entropic", entropic_beta=1e-4) == pytest.approx(worst, abs=1e-2)


def test_a_reward_model_of_another_tokenizer_reads_the_text(folder: Path) -> None:
    same = evaluated(settings(folder))[1]
    reward = folder / "runs" / "run" / "reward-model"
    # The same merges under another name of the end token: the same text, but tokens that may not be passed on.
    for path in (reward / "tokenizer.json", reward / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("<|end|>", "<|fin|>"))
    other = evaluated(settings(folder))[1]
    for a, b in zip(same.pairs, other.pairs, strict=True):
        assert (a.after, a.judge_after) == (b.after, b.judge_after)
    assert [a.reward_after for a in same.pairs] != [b.reward_after for b in other.pairs]


def test_policies_with_different_tokenizers_are_refused(folder: Path) -> None:
    other = folder / "other"
    save_model(tiny_lm(), tiny_tokenizer(270), other)
    with pytest.raises(TokenizerMismatch, match="different tokenizers"):
        run(settings(folder, after=other))


def test_a_missing_policy_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        run(settings(folder, after=folder / "nowhere"))


def test_two_sources_of_rewards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        EvaluateSettings(reward_rule="a:b", reward_model=tmp_path)
