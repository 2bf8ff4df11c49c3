"""A PPO step over a tiny model, and a critic for it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.models.causal import disable_dropout
from rlhf.ppo.kl_control import KlController
from rlhf.ppo.learner import Learner
from rlhf.ppo.settings import CriticSettings, KlSettings, PpoSettings, ShapingSettings
from rlhf.ppo.step import PpoStep
from support.tiny import tiny_lm, tiny_tokenizer

ALONE = {
    "gae": {},
    "a2c": {"epochs": 1},
    "rloo": {"completions": 4},
    "grpo": {"completions": 4},
    "reinforce++": {},
}
"""Each estimator with the settings that it cannot do without."""


class TinyCritic(nn.Module):
    """Any scalar model will do; the reward model's own tests are elsewhere."""

    mean, std = 0.0, 1.0

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(policy.base_model)
        self.head = nn.Linear(policy.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def token_values(self, input_ids, attention_mask):
        return self.head(self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state).squeeze(-1)


def tiny_step(
    *,
    policy: PreTrainedModel | None = None,
    kl: KlSettings | None = None,
    critic: CriticSettings | None = None,
    shaping: ShapingSettings | None = None,
    **settings: Any,
) -> PpoStep:
    """Over `tiny_lm`, with a critic of its own unless the critic's settings share the trunk."""
    policy = tiny_lm() if policy is None else policy
    disable_dropout(policy)
    critic = critic or CriticSettings(lr=1e-3)
    kl = kl or KlSettings()
    learner = Learner(
        policy,
        TinyCritic(policy) if critic.kind == "separate" else None,
        PpoSettings(**{"epochs": 2, "lr": 1e-3, **settings}),
        critic,
        kl,
        temperature=1.0,
        pad_id=tiny_tokenizer().pad_token_id,
    )
    generator = torch.Generator().manual_seed(0)
    return PpoStep(learner, KlController(kl), generator, shaping=shaping or ShapingSettings())


def weights_of(model: nn.Module) -> torch.Tensor:
    """All of them in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
