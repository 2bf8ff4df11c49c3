"""Against TRL 1.12.0, the last TRL with a PPO trainer: the same model, prompts, sampled tokens and reward through its
`PPOTrainer.train` and through `PpoStep`.

Where the definitions agree: rewards, advantages, returns, losses and KL to 1e-4, gradients and the first change of the
weights to 1e-3 of their norm. Where they differ on purpose, the difference is asserted and explained.
"""

import math

import pytest
import torch

from rlhf.models.reward import ended
from rlhf.ppo.settings import CriticSettings, PpoSettings
from support.parity import (
    EOS,
    RESPONSE,
    new_case,
    our_scores,
    our_step,
    relative_error,
    response_mask,
    sequences,
)
from support.trl_ppo import trl_step

MODULES = ("policy", "critic")


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Responses all of one length, with and without an end token in their last place: here all definitions agree."""
    return new_case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def ours(case):
    return our_step(case)


@pytest.fixture(scope="module")
def theirs(case, tmp_path_factory):
    return trl_step(case, tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Responses that end at places of their own."""
    return new_case(tmp_path_factory.mktemp("short"), ended_early=True, epochs=1)


# Where the definitions agree.


@pytest.mark.parametrize("name", ["scores", "logprobs", "ref_logprobs", "values", "rewards", "returns"])
def test_what_goes_into_a_step_agrees(ours, theirs, name):
    found, expected = getattr(ours, name), getattr(theirs, name)
    assert expected.std() > 0.01
    close(found, expected)


def test_advantages_agree(ours, theirs):
    close(ours.advantages, theirs.advantages)


def test_kl_agrees(ours, theirs):
    assert abs(theirs.kl) > 0.01
    assert ours.kl == pytest.approx(theirs.kl, abs=1e-4)
    assert theirs.figures["objective/kl"] == pytest.approx(ours.figures["kl_mean"], abs=1e-4)


def test_losses_of_every_update_agree(ours, theirs):
    """In the second update the ratio is not 1 any more, and both clips hold something back."""
    assert len(theirs.policy_losses) == len(ours.policy_losses) == 2
    assert abs(theirs.policy_losses[1]) > 0.01
    assert ours.policy_losses == pytest.approx(theirs.policy_losses, abs=1e-4)
    assert ours.value_losses == pytest.approx(theirs.value_losses, abs=1e-4)
    assert ours.figures["clip_fraction"] == pytest.approx(theirs.figures["policy/clipfrac_avg"], abs=1e-6)
    assert theirs.figures["policy/clipfrac_avg"] > 0


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("update", [0, 1])
def test_gradients_agree(ours, theirs, module, update):
    assert relative_error(ours.gradients[update], theirs.gradients[update], module) < 1e-3


@pytest.mark.parametrize("module", MODULES)
def test_the_first_change_of_the_weights_agrees(ours, theirs, module):
    assert relative_error(ours.first_change, theirs.first_change, module) < 1e-3


def test_the_k3_estimator_agrees(tmp_path):
    case = new_case(tmp_path, kl_estimator="k3", epochs=1)
    ours, theirs = our_step(case), trl_step(case, tmp_path / "trl")
    close(ours.rewards, theirs.rewards)
    close(ours.advantages, theirs.advantages)


def test_whitened_rewards_agree(tmp_path):
    case = new_case(tmp_path, whiten_rewards=True, epochs=1)
    ours, theirs = our_step(case), trl_step(case, tmp_path / "trl")
    close(ours.advantages, theirs.advantages)
    close(ours.returns, theirs.returns)


def test_a_penalty_for_a_missing_end_token_is_subtracted_alike(tmp_path):
    case = new_case(tmp_path, missing_eos_penalty=1.0, epochs=1)
    ours, theirs = our_step(case), trl_step(case, tmp_path / "trl")
    close(ours.rewards, theirs.rewards)
    cut_off = torch.tensor([response[-1] != EOS for response in case.responses])
    close(theirs.scores, our_scores(case) - cut_off.float())


# Where they differ on purpose.


def test_bessels_correction(case, ours, tmp_path):
    """TRL divides by n - 1 when it whitens, lm-human-preferences and this project by n: over a batch's tokens a factor
    that is nearly 1, the same for all, and harmless."""
    theirs = trl_step(case, tmp_path, bessel=True)
    n = int(response_mask(case).sum())
    assert (theirs.advantages - ours.advantages).abs().max() > 1e-3
    close(theirs.advantages, ours.advantages * math.sqrt((n - 1) / n))


def test_the_score_comes_with_the_end_token_and_not_one_step_later(short, tmp_path):
    """TRL gives the score of a response that ended early at the first pad token, one step after the end token, and
    trains its critic on the state between. The end token is an action and the score its reward: here both come
    together. The same score one step later: with λ = 1 the advantages are equal, and else they differ by what GAE takes
    from the critic of that state, (γ = 1) (1 - λ) λᵏ (V - score), k tokens before the end."""
    without = {"gamma": 1.0, "kl_coef": 0.05, "epochs": 1}
    for lam in (1.0, 0.95):
        case = new_case(tmp_path / str(lam), ended_early=True, gae_lambda=lam, **without)
        ours = our_step(case, whiten_advantages=False)
        theirs = trl_step(case, tmp_path / f"trl-{lam}")
        mask = response_mask(case)
        rows = torch.tensor([len(response) for response in case.responses])
        early = rows < RESPONSE
        assert early.any()
        last = torch.arange(len(rows)), rows - 1
        close(ours.rewards[last][early] + 0.0, (theirs.rewards[last] + theirs.scores)[early])
        close(theirs.rewards[early, rows[early]], theirs.scores[early])
        behind = torch.zeros(len(rows))
        behind[early] = theirs.values[early, rows[early]]
        before_end = (rows - 1).unsqueeze(1) - torch.arange(RESPONSE)
        shift = (1 - lam) * lam**before_end * (behind - theirs.scores).unsqueeze(1) * early.unsqueeze(1)
        # Returns are advantages before whitening plus values, on both sides.
        found, expected = ours.returns[mask] + shift[mask], theirs.returns[mask]
        close(found, expected)
        assert lam == 1.0 or shift[mask].abs().max() > 1e-3


def test_entropy_does_not_count_padding(short, tmp_path):
    """TRL's policy/entropy_avg is a mean over all places of [B, T], with what the network says behind the end; here it
    is one over sampled tokens."""
    ours, theirs = our_step(short), trl_step(short, tmp_path)
    assert abs(ours.figures["entropy"] - theirs.figures["policy/entropy_avg"]) > 1e-3
    full = new_case(tmp_path / "full", epochs=1)
    ours, theirs = our_step(full), trl_step(full, tmp_path / "trl")
    assert ours.figures["entropy"] == pytest.approx(theirs.figures["policy/entropy_avg"], abs=1e-4)


def test_approximate_kl_does_not_count_padding(tmp_path):
    """Over padding the log-ratio is 0, so TRL's mean is this project's times the share of places that are filled: the
    more responses end early, the smaller a step looks."""
    case = new_case(tmp_path, ended_early=True, gae_lambda=1.0, gamma=1.0)
    ours, theirs = our_step(case), trl_step(case, tmp_path / "trl")
    filled = response_mask(case).float().mean().item()
    assert filled < 0.9
    assert theirs.figures["policy/approxkl_avg"] == pytest.approx(filled * ours.figures["approx_kl"], rel=1e-2)


def test_a_missing_end_token_may_replace_the_score(tmp_path):
    """TRL can only subtract. lm-human-preferences replaces the score, so that a response that was cut off cannot make
    up for it; `missing_eos = "replace"` does that."""
    case = new_case(tmp_path, missing_eos_penalty=1.0, epochs=1, kl_coef=0.0)
    replaced = our_step(case, missing_eos="replace").rewards[:, -1]
    theirs = trl_step(case, tmp_path / "trl").rewards[:, -1]
    cut_off = torch.tensor([response[-1] != EOS for response in case.responses])
    close(replaced[cut_off], -torch.ones(int(cut_off.sum())))
    close(theirs[cut_off], our_scores(case)[cut_off] - 1.0)
    close(replaced[~cut_off], theirs[~cut_off])


def test_a_reward_model_reads_an_end_token_whether_or_not_there_is_one(case, theirs):
    """TRL scores a response that was cut off at its last token, a place that no training of the reward model read; here
    the reward service reads every text up to an end token, as in its training."""
    given = sequences(case)
    read = [ended(ids, EOS) for ids in given]
    assert [ids[-1] == EOS for ids in read] == [True] * len(read)
    with torch.no_grad():
        scores = torch.cat(
            [case.reward(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)) for ids in read]
        )
    cut_off = torch.tensor([ids[-1] != EOS for ids in given])
    close(scores[~cut_off], theirs.scores[~cut_off])
    assert (scores - theirs.scores)[cut_off].abs().max() > 1e-2


@pytest.mark.parametrize("module", MODULES)
def test_adams_epsilon(module, tmp_path):
    """lm-human-preferences takes 1e-5 and so does this project; TRL leaves transformers' 1e-8. The first change of a
    weight is -lr · g / (|g| + ε), so that with 1e-8 a weight that hardly matters moves as far as any."""
    case = new_case(tmp_path, epochs=1, adam_epsilon=PpoSettings().adam_epsilon)
    ours, theirs = our_step(case), trl_step(case, tmp_path / "trl", adam_epsilon=1e-8)
    assert PpoSettings().adam_epsilon == 1e-5
    for side, epsilon in ((ours, 1e-5), (theirs, 1e-8)):
        gradient = side.gradients[0]
        expected = {name: -case.lr * g / (g.abs() + epsilon) for name, g in gradient.items()}
        change = {name: side.first_change[name] for name in expected}
        assert relative_error(change, expected, module) < 1e-2
    assert relative_error(ours.first_change, theirs.first_change, module) > 0.01


def test_gradients_are_clipped_and_trls_are_not(tmp_path):
    """`max_grad_norm` of TRL's config reaches nothing in its PPO trainer."""
    case = new_case(tmp_path, epochs=1)
    ours, theirs = our_step(case, max_grad_norm=1e-3), trl_step(case, tmp_path / "trl", max_grad_norm=1e-3)

    def norm(gradients, module):
        return torch.cat([g.flatten() for name, g in gradients.items() if name.startswith(module)]).norm().item()

    for module in MODULES:
        assert norm(ours.gradients[0], module) == pytest.approx(1e-3, rel=1e-2)
        assert norm(theirs.gradients[0], module) > 1e-2


def test_the_critics_coefficient_acts_on_a_shared_trunk_alone(tmp_path):
    """TRL's `vf_coef` = 0.1 scales the gradient of a critic that shares no weight with the policy, and Adam undoes it
    but for its ε; a separate critic has a learning rate of its own here instead."""
    case = new_case(tmp_path, epochs=1)
    ours, theirs = our_step(case), trl_step(case, tmp_path / "trl", vf_coef=0.1)
    tenfold = {name: 10 * g for name, g in theirs.gradients[0].items()}
    assert relative_error(ours.gradients[0], tenfold, "critic") < 1e-3
    assert CriticSettings().coef == 0.1
    assert CriticSettings().kind == "separate"
