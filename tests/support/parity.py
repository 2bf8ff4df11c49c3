"""One PPO step on given tokens, watched: what `tests/parity` compares with TRL's, made by this project's own step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import rlhf.ppo.step
from rlhf.models.causal import disable_dropout
from rlhf.models.padding import pad
from rlhf.models.reward import RewardModel
from rlhf.ppo.experience import gather
from rlhf.ppo.kl_control import KlController
from rlhf.ppo.learner import Learner, Targets, UpdateFigures
from rlhf.ppo.settings import CriticSettings, KlSettings, PpoSettings
from rlhf.ppo.step import PpoStep
from rlhf.reference.requests import Item
from rlhf.reference.scorer import ReferenceModel
from rlhf.wire.records import FinishReason, Rollout
from support.rollouts import rollout, scored
from support.tiny import tiny_lm, tiny_reward_folder, tiny_tokenizer

Weights = dict[str, Tensor]
"""By module ("policy", "critic") and parameter: "policy.model.norm.weight"."""
RESPONSE = 10
"""Tokens of a response at most."""
EOS, PAD = tiny_tokenizer().eos_token_id, tiny_tokenizer().pad_token_id


@dataclass(frozen=True)
class Case:
    """What both sides get. Models are copied before anything is trained."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    critic: RewardModel
    reward: RewardModel
    prompts: Sequence[list[int]]
    """All different, so that a row can be found again after TRL has shuffled them."""
    responses: Sequence[list[int]]
    """Of `RESPONSE` tokens, or up to and with an end token."""
    temperature: float = 0.7
    kl_coef: float = 0.05
    gamma: float = 0.99
    gae_lambda: float = 0.95
    lr: float = 1e-3
    adam_epsilon: float = 1e-5
    epochs: int = 2
    kl_estimator: str = "k1"
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None


def new_case(folder: Path, *, ended_early: bool = False, **settings: Any) -> Case:
    """16 prompts of 3 to 7 tokens with responses from the policy; every third one ends with an end token: with its last
    token, or in the middle of the others' length.

    The reference is near the policy but not equal to it, so that KL is not 0.
    """
    policy = tiny_lm(seed=0)
    case = Case(
        policy,
        _perturbed(policy, 0.05),
        RewardModel.load(tiny_reward_folder(folder / "critic", seed=1, mean=0.0, std=1.0)),
        RewardModel.load(tiny_reward_folder(folder / "reward", seed=2, mean=0.0, std=1.0)),
        prompts=_prompts(16),
        responses=[],
        **settings,
    )
    sampled = [_sampled(policy, prompt, case.temperature, seed) for seed, prompt in enumerate(case.prompts)]
    for row, response in enumerate(sampled):
        if row % 3 == 0:
            response[(3 + row // 3 if ended_early else RESPONSE - 1) :] = [EOS]
    return replace(case, responses=sampled)


@dataclass
class Watched:
    """What one side computed. Per-token tensors are [S, RESPONSE], 0 outside the response, in the case's order."""

    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    returns: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    ref_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    kl: float = 0.0
    """Nats per response."""
    policy_losses: list[float] = field(default_factory=list)
    """Of each update."""
    value_losses: list[float] = field(default_factory=list)
    gradients: list[Weights] = field(default_factory=list)
    weights: list[Weights] = field(default_factory=list)
    """Before the first update, and after each."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What goes to the log."""

    @property
    def first_change(self) -> Weights:
        return {name: after - self.weights[0][name] for name, after in self.weights[1].items()}


def our_step(case: Case, *, scores: Tensor | None = None, **settings: Any) -> Watched:
    """
    Args:
        scores: [S]; None: the reward model's.
        settings: of `PpoSettings`, beside the case's.
    """
    watched = Watched()
    watched.scores = our_scores(case) if scores is None else scores
    rollouts = _rollouts(case, watched.scores)
    step = _new_step(case, settings)
    at = gather(rollouts).response_mask
    shape = response_mask(case)

    def rows(flat: Tensor) -> Tensor:
        return torch.zeros(shape.shape).masked_scatter(shape, flat[at])

    _watch_optimizers(watched, step.learner)
    found: dict[str, Tensor] = {}
    _record_call(step.learner, "improve", lambda given, made: _note_update(watched, found, given[2], made))
    with mock.patch.object(rlhf.ppo.step, "token_rewards", _kept(rlhf.ppo.step.token_rewards, found, "rewards")):
        figures = step(rollouts)
    watched.rewards = rows(found["rewards"])
    for name in ("advantages", "returns", "old_values", "old_logprobs", "ref_logprobs"):
        setattr(watched, name.removeprefix("old_"), rows(found[name]))
    watched.kl, watched.figures = figures.kl_mean, vars(figures)
    return watched


def our_scores(case: Case) -> Tensor:
    """[S]: at each sequence's own last token, no end token added."""
    ids, mask = pad(sequences(case), 0)
    with torch.no_grad():
        return case.reward(ids, mask)


def sequences(case: Case) -> list[list[int]]:
    return [[*prompt, *response] for prompt, response in zip(case.prompts, case.responses, strict=True)]


def response_mask(case: Case) -> Tensor:
    """[S, RESPONSE]"""
    return torch.arange(RESPONSE) < torch.tensor([len(response) for response in case.responses]).unsqueeze(1)


def named_parameters(modules: Mapping[str, nn.Module], read: Callable[[nn.Parameter], Tensor | None]) -> Weights:
    """Copies of what `read` gives of each parameter."""
    found = {
        f"{module}.{name}": read(parameter)
        for module, owner in modules.items()
        for name, parameter in owner.named_parameters()
    }
    return {name: value.detach().clone() for name, value in found.items() if value is not None}


def relative_error(found: Weights, expected: Weights, module: str) -> float:
    """‖found - expected‖ / ‖expected‖ over all parameters of a module."""
    assert found.keys() == expected.keys()
    names = [name for name in expected if name.startswith(f"{module}.")]
    one, other = (torch.cat([side[name].flatten() for name in names]).double() for side in (found, expected))
    assert other.norm() > 0
    return float((one - other).norm() / other.norm())


def _new_step(case: Case, settings: Mapping[str, Any]) -> PpoStep:
    own = {
        "epochs": case.epochs,
        "lr": case.lr,
        "gamma": case.gamma,
        "gae_lambda": case.gae_lambda,
        "adam_epsilon": case.adam_epsilon,
        "whiten_rewards": case.whiten_rewards,
        "missing_eos_penalty": case.missing_eos_penalty,
        # TRL's PPO trainer never clips gradients.
        "max_grad_norm": 1e9,
    }
    kl = KlSettings(coef=case.kl_coef, estimator=case.kl_estimator)
    policy, critic = copy.deepcopy(case.policy), copy.deepcopy(case.critic)
    disable_dropout(policy)
    learner = Learner(
        policy,
        critic,
        PpoSettings(**{**own, **settings}),
        CriticSettings(lr=case.lr),
        kl,
        temperature=case.temperature,
        pad_id=PAD,
    )
    return PpoStep(learner, KlController(kl), torch.Generator().manual_seed(0))


def _rollouts(case: Case, scores: Tensor) -> list[Rollout]:
    whole = sequences(case)
    reference = ReferenceModel(case.reference, model_sha256="", tokenizer_sha256="")
    items = [
        Item(np.array(ids), len(prompt), case.temperature) for ids, prompt in zip(whole, case.prompts, strict=True)
    ]
    ref_logprobs = reference.forward(items)
    return [
        rollout(
            row,
            scored(
                ids,
                len(case.prompts[row]),
                score=float(scores[row]),
                ref_logprobs=ref_logprobs[row].tolist(),
                finish_reason=FinishReason.EOS if ids[-1] == EOS else FinishReason.LENGTH,
            ),
        )
        for row, ids in enumerate(whole)
    ]


def _watch_optimizers(watched: Watched, learner: Learner) -> None:
    """Gradients as they are when a weight is changed, clipping and all; weights after each update of both modules."""
    assert learner.critic is not None
    modules = {"policy": learner.policy, "critic": learner.critic.classifier}
    watched.weights.append(named_parameters(modules, lambda p: p))
    pending: Weights = {}

    def before(name: str) -> None:
        pending.update(named_parameters({name: modules[name]}, lambda p: p.grad))

    def after(name: str) -> None:
        if name == "critic":
            watched.gradients.append(dict(pending))
            watched.weights.append(named_parameters(modules, lambda p: p))

    for name, optimizer in learner.optimizers.items():
        optimizer.register_step_pre_hook(lambda *_, name=name: before(name))
        optimizer.register_step_post_hook(lambda *_, name=name: after(name))


def _note_update(watched: Watched, found: dict[str, Tensor], targets: Targets, made: UpdateFigures) -> None:
    found.update({name: value for name, value in vars(targets).items() if isinstance(value, Tensor)})
    watched.policy_losses.append(made.policy_loss)
    watched.value_losses.append(made.value_loss)


def _record_call(owner: Any, name: str, note: Callable[[tuple[Any, ...], Any], None]) -> None:
    original = getattr(owner, name)

    def recorded(*given: Any) -> Any:
        made = original(*given)
        note(given, made)
        return made

    setattr(owner, name, recorded)


def _kept(function: Callable[..., Tensor], into: dict[str, Tensor], name: str) -> Callable[..., Tensor]:
    def keeping(*given: Any, **named: Any) -> Tensor:
        into[name] = function(*given, **named)
        return into[name]

    return keeping


def _perturbed(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=generator))
    return other


def _prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [3 + row % 5 for row in range(count)]
    return [torch.randint(5, 270, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def _sampled(policy: PreTrainedModel, prompt: list[int], temperature: float, seed: int) -> list[int]:
    """`RESPONSE` tokens, none of them the end or the pad token: TRL takes that for padding wherever it stands."""
    generator, ids = torch.Generator().manual_seed(seed), list(prompt)
    for _ in range(RESPONSE):
        logits = policy(input_ids=torch.tensor([ids])).logits[0, -1]
        logits[[EOS, PAD]] = -torch.inf
        ids.append(int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)))
    return ids[len(prompt) :]
