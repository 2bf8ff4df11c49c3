"""`rlhf evaluate --frontier` on tiny policies: points against their definitions, and a run from training to report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.cli.main import main
from rlhf.data.prompts import Prompt
from rlhf.data.rows import write_rows
from rlhf.errors import DataError, TokenizerMismatch
from rlhf.evaluate import report
from rlhf.evaluate.compare import run
from rlhf.evaluate.findings import sentences
from rlhf.evaluate.policies import Policy
from rlhf.evaluate.results import Fit, Frontier, Point, read_frontier, write_frontier
from rlhf.evaluate.scaling import Resamples, best_of_n_kl_bound, fit
from rlhf.evaluate.scoring import kl_sums, logprob_sums
from rlhf.evaluate.settings import EvaluateSettings
from rlhf.models.causal import save_model
from rlhf.policy.settings import SamplingSettings
from rlhf.ppo import loop
from rlhf.queues.connection import connect
from rlhf.queues.settings import RedisSettings
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from rlhf.wire.records import Sampling, Stopping
from support.answering import AnsweringWorker
from support.tiny import tiny_lm, tiny_lm_folder, tiny_reward_folder, tiny_tokenizer

PROMPTS = ["The film", "I saw", "A fine", "The plot of this", "It was", "Avoid"]
RULE = "def letters(items):\n    return [len(set(item.completion)) for item in items]\n"
TEMPERATURE = 0.7
SAMPLES = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose policy went from seed 0's weights towards seed 1's."""
    run_folder = tmp_path / "runs" / "run"
    tiny_lm_folder(run_folder / "pretrained", seed=0)
    tiny_reward_folder(run_folder / "reward-model", seed=2)
    for step in (1, 2, 3, 4, 6):
        save_model(between((step / 6) ** 2), tiny_tokenizer(), run_folder / "snapshots" / str(step))
    save_model(between(1.0), tiny_tokenizer(), run_folder / "policy")
    write_rows(run_folder / "data" / "heldout_prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    (tmp_path / "rule.py").write_text(RULE)
    return tmp_path


def between(share: float) -> Any:
    model, other = tiny_lm(seed=0), tiny_lm(seed=1)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, share)
    return model


def settings(folder: Path, **evaluate: Any) -> Settings:
    wanted: dict[str, Any] = {"judge": f"{folder / 'rule.py'}:letters", "frontier": True, "frontier_samples": SAMPLES}
    return Settings(
        run=RunSettings(folder=folder / "runs"),
        sampling=SamplingSettings(temperature=TEMPERATURE, max_new_tokens=8),
        evaluate=EvaluateSettings(**wanted | {"frontier_completions": 2} | evaluate),
    )


def measured(chosen: Settings) -> tuple[dict[str, Any], Frontier]:
    return dict(run(chosen)), read_frontier(chosen.paths.frontier)


def test_points_of_both_ways(folder: Path) -> None:
    figures, frontier = measured(settings(folder))
    names = [point.name for point in frontier.points]
    assert names[:4] == ["best of 2", "best of 4", "best of 8", "best of 16"]
    assert names[4:] == ["step 1", "step 2", "step 3", "step 4", "step 6"], "the policy is the last snapshot"
    for point, n in zip(frontier.points[:4], (2, 4, 8, 16), strict=True):
        assert point.kl == pytest.approx(best_of_n_kl_bound(n))
        assert point.kl_interval == pytest.approx((point.kl, point.kl))
    proxy = [point.proxy_gain for point in frontier.points[:4]]
    assert 0 < proxy[0] < proxy[1] < proxy[2] < proxy[3], "the best of more is better by what chooses it"
    for point in frontier.points[4:]:
        low, high = point.kl_interval
        assert low is not None
        assert high is not None
        assert 0 < low < point.kl < high
    assert [fitted.form for fitted in frontier.fits] == ["best_of_n", "rl"], frontier.refused
    assert (frontier.refused, frontier.prompts, frontier.samples) == ({}, len(PROMPTS), SAMPLES)
    assert 0.5 < frontier.distinct_share <= 1
    assert figures["prompts"] == len(PROMPTS), "the comparison is made as ever"
    assert figures["frontier_points"] == 9
    assert figures["frontier_rl_alpha"] == frontier.fits[1].alpha
    json.dumps(figures, allow_nan=False)


def test_a_policy_that_is_no_snapshot_is_a_point_of_its_own(folder: Path) -> None:
    save_model(between(0.9), tiny_tokenizer(), folder / "runs" / "run" / "policy")
    _, frontier = measured(settings(folder))
    assert "policy" in [point.name for point in frontier.points]


def test_the_seed_decides_everything(folder: Path) -> None:
    first, again, other = (measured(settings(folder, seed=seed))[1] for seed in (1, 1, 2))
    assert first == again
    assert first.points != other.points


def test_best_of_all_samples_is_what_the_proxy_likes_best(folder: Path) -> None:
    """Against a plain choice among the same completions, with the rule as proxy and judge."""
    chosen = settings(folder, reward_rule=f"{folder / 'rule.py'}:letters")
    _, frontier = measured(chosen)
    policy = Policy.load(chosen.paths.pretrained, "cpu", "float32")
    sampling = Sampling(temperature=TEMPERATURE, seed=chosen.evaluate.seed, completions=SAMPLES)
    answers = policy.answer([Prompt(text, None, {}) for text in PROMPTS], sampling, Stopping(max_new_tokens=8))
    letters = np.array([len(set(answer.text)) for answer in answers]).reshape(len(PROMPTS), SAMPLES)
    gain = (letters.max(1) - letters.mean(1)).mean()
    best = frontier.points[3]
    assert (best.proxy_gain, best.judge_gain) == pytest.approx((gain, gain))
    assert frontier.judge_initial == pytest.approx(letters.mean())
    distinct = np.mean([len({answer.text for answer in answers[i : i + SAMPLES]}) for i in range(0, 96, SAMPLES)])
    assert frontier.distinct_share == pytest.approx(distinct / SAMPLES, abs=0.05)


def test_kl_is_exact_at_every_token_of_the_policys_answers(folder: Path) -> None:
    """Against a plain sum over the vocabulary of each answer by itself, and in the mean against log-ratios."""
    run_folder = folder / "runs" / "run"
    policy, initial = (Policy.load(run_folder / name, "cpu", "float32") for name in ("snapshots/1", "pretrained"))
    sampling = Sampling(temperature=TEMPERATURE, seed=5, completions=64)
    answers = policy.answer([Prompt(text, None, {}) for text in PROMPTS], sampling, Stopping(max_new_tokens=8))
    found = kl_sums(policy, initial, answers, TEMPERATURE)
    for answer, kl in list(zip(answers, found, strict=True))[::48]:
        with torch.no_grad():
            ids = torch.tensor([answer.token_ids.tolist()])
            log_p, log_q = (torch.log_softmax(one.model(ids).logits[0] / TEMPERATURE, -1) for one in (policy, initial))
        per_token = (log_p.exp() * (log_p - log_q)).sum(-1)[len(answer.prompt_ids) - 1 : -1]
        assert kl == pytest.approx(per_token.sum().item(), abs=1e-4)
    ratios = logprob_sums(policy.as_reference(), answers, TEMPERATURE)
    ratios = ratios - logprob_sums(initial.as_reference(), answers, TEMPERATURE)
    assert found.min() >= 0
    assert found.std() < ratios.std()
    assert abs(np.mean(found - ratios)) < 4 * np.std(found - ratios) / math.sqrt(len(found))


def test_without_snapshots_best_of_n_is_drawn_and_the_other_fit_refused(folder: Path) -> None:
    for path in (folder / "runs" / "run" / "snapshots").iterdir():
        path.rename(folder / f"was-{path.name}")
    chosen = settings(folder)
    figures, frontier = measured(chosen)
    assert [fitted.form for fitted in frontier.fits] == ["best_of_n"]
    assert frontier.refused["rl"].startswith("points away from the initial policy: 1, too few")
    assert "ppo.snapshot_every" in frontier.refused["rl"]
    assert not [name for name in figures if name.startswith("frontier_rl")]
    report.run(chosen)
    assert "PPO: no curve was fitted: points away from the initial policy: 1" in chosen.paths.report.read_text()


def test_a_snapshot_with_another_tokenizer_is_refused(folder: Path) -> None:
    save_model(tiny_lm(), tiny_tokenizer(270), folder / "runs" / "run" / "snapshots" / "2")
    with pytest.raises(TokenizerMismatch, match="snapshots/2 and the initial policy"):
        run(settings(folder))


def test_a_file_that_is_no_frontier_is_named(tmp_path: Path) -> None:
    path = tmp_path / "frontier.json"
    path.write_text('{"points": [], "fits": [{"form": "rl"}]}')
    with pytest.raises(DataError, match=r"frontier\.json: is no frontier"):
        read_frontier(path)


@pytest.fixture
def trained(tmp_path: Path, run_name: str, redis_settings: RedisSettings) -> Iterator[Settings]:
    """A run of six steps through a real Redis, with a worker that answers at random."""
    made = Settings.model_validate(
        {
            "run": {"name": run_name, "folder": tmp_path},
            "redis": redis_settings.model_dump(),
            "ppo": {"steps": 6, "batch_prompts": 4, "epochs": 2, "lr": 0.003, "threads": 1, "checkpoint_every": 3},
            "sampling": {"max_new_tokens": 8},
        }
    )
    tiny_lm_folder(made.paths.pretrained)
    tiny_reward_folder(made.paths.reward_model)
    for path in (made.paths.prompts, made.paths.heldout_prompts):
        write_rows(path, [{"prompt": prompt} for prompt in PROMPTS])
    worker = AnsweringWorker(connect(made), run_name, made.redis, lambda task: None)
    worker.start()
    yield made
    worker.stop()


def test_from_training_to_the_report(trained: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ppo = trained.ppo.model_copy(update={"snapshot_every": 1, "keep_snapshots": 5})
    loop.run(trained.model_copy(update={"ppo": ppo}))
    (tmp_path / "rule.py").write_text(RULE)
    common = ["--set", f"run.folder={tmp_path}", "--run", trained.run.name, "--set", "sampling.max_new_tokens=8"]
    options = ["--frontier", "--frontier-samples", "16", "--judge", f"{tmp_path / 'rule.py'}:letters"]
    assert main(["evaluate", *common, *options]) == 0, capsys.readouterr().err
    frontier = read_frontier(trained.paths.frontier)
    steps = [point.name for point in frontier.points if point.form == "rl"]
    assert steps == ["step 2", "step 3", "step 4", "step 5", "step 6"]
    assert main(["report", *common]) == 0
    page = trained.paths.report.read_text()
    assert "<h2>Over-optimisation</h2>" in page
    for sentence in sentences(frontier):
        assert sentence.replace("'", "&#39;") in page


def test_snapshots_of_an_undone_future_go(trained: Settings) -> None:
    ppo = trained.ppo.model_copy(update={"snapshot_every": 2, "steps": 4})
    loop.run(trained.model_copy(update={"ppo": ppo}))
    folder = trained.paths.snapshots
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]
    (folder / "4").rename(folder / "8")
    loop.run(trained.model_copy(update={"ppo": ppo.model_copy(update={"steps": 6})}))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "6"]


def curve(top: float, turn: float) -> Fit:
    """A parabola through 0 with its peak at `turn`, measured up to √KL 2."""
    d = np.array([[0.5], [1.0], [1.5], [2.0]])
    return fit("best_of_n", d**2, top * d * (2 * turn - d) / turn**2, Resamples.draw(1, 0))


def test_sentences_say_what_the_curve_does() -> None:
    frontier = Frontier("i", "r", "j", {}, 0, 1, 16, 4, 0.0, 0.5, 1.0, (), (curve(0.2, 1.0),), {"rl": "because"})
    turned, refused = sentences(frontier)
    assert "has its peak at √KL 1.00 [1.00, 1.00], with +0.200 [0.200, 0.200]; in 100% of" in turned
    assert turned.endswith("it misses the points by 0.000.")
    assert refused == "PPO: no curve was fitted: because."
    (rising,) = sentences(replace(frontier, fits=(curve(0.2, 5.0),), refused={}))
    assert "still rises at √KL 2.00, the farthest point; its peak, at √KL 5.00" in rising
    (endless,) = sentences(replace(frontier, fits=(curve(-0.2, -1.0),), refused={}))
    assert "has no peak in reach; in 0% of" in endless


def test_sentences_say_what_was_measured() -> None:
    judged = {"step 4": 0.1, "step 8": 0.3, "step 12": 0.2}
    points = [
        Point("rl", name, 4.0, (3.0, 5.0), 10 * number, (0, 9), gain, (gain - 0.1, gain + 0.1))
        for number, (name, gain) in enumerate(judged.items(), start=1)
    ]
    frontier = Frontier("i", "r", "j", {}, 0, 1, 16, 4, 0.0, 0.5, 1.0, tuple(points), (), {})
    assert sentences(frontier) == [
        "PPO: measured, the judge's score was highest at step 8, √KL 2.00, with +0.300 [0.200, 0.400]; the last, step "
        "12, is at √KL 2.00, with +0.200 [0.100, 0.300], the reward +10.00 from there."
    ]
    (rising,) = sentences(replace(frontier, points=tuple(points[:2])))
    assert rising.endswith("highest at step 8, √KL 2.00, with +0.300 [0.200, 0.400], the last point.")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    frontier = Frontier("i", "r", "j", {}, 0, 1, 16, 4, 0.0, 0.5, 1.0, (), (curve(-0.2, -1.0),), {"rl": "because"})
    write_frontier(tmp_path / "frontier.json", frontier)
    assert read_frontier(tmp_path / "frontier.json") == frontier
