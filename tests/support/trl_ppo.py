"""TRL's PPOTrainer on given tokens, watched. Its own code does everything; only `generate` of the model answers with
the case's responses instead of sampling, and `backward` looks at what `train` holds before it goes on.

Needs TRL 1.12.0, so nothing but tests/parity imports this.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from support.parity import PAD, RESPONSE, Case, Watched, named_parameters
from support.tiny import tiny_tokenizer

PER_TOKEN = ("rewards", "advantages", "returns", "values", "logprobs", "ref_logprobs")


def trl_step(case: Case, folder: Path, *, bessel: bool = False, **settings: Any) -> Watched:
    """One batch through `PPOTrainer.train`.

    Args:
        bessel: leave TRL's variance as it is, with Bessel's correction; else it is told `unbiased=False`.
        settings: of `PPOConfig`, beside the case's.
    """
    watched = Watched()
    variance = partial(ppo_trainer.masked_var, unbiased=bessel)
    with warnings.catch_warnings(), mock.patch.object(ppo_trainer, "masked_var", variance):
        warnings.simplefilter("ignore")
        trainer = _new_trainer(case, folder, settings)
        trainer.policy_model.generate = _answers(trainer.policy_model, case)
        _watch(watched, trainer, case)
        trainer.train()
    return watched


def _new_trainer(case: Case, folder: Path, settings: dict[str, Any]) -> PPOTrainer:
    own = {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(case.prompts),
        "total_episodes": len(case.prompts),
        "num_ppo_epochs": case.epochs,
        "response_length": RESPONSE,
        "stop_token": "eos",
        "temperature": case.temperature,
        "kl_coef": case.kl_coef,
        "kl_estimator": case.kl_estimator,
        "whiten_rewards": case.whiten_rewards,
        "missing_eos_penalty": case.missing_eos_penalty,
        "gamma": case.gamma,
        "lam": case.gae_lambda,
        "learning_rate": case.lr,
        "lr_scheduler_type": "constant",
        "adam_epsilon": case.adam_epsilon,
        # Policy and critic share no weight, so the coefficient only scales the critic's gradient.
        "vf_coef": 1.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "num_sample_generations": 0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.padding_side = "left"
    return PPOTrainer(
        args=PPOConfig(**{**own, **settings}),
        processing_class=tokenizer,
        model=copy.deepcopy(case.policy),
        ref_model=copy.deepcopy(case.reference),
        reward_model=copy.deepcopy(case.reward.classifier),
        value_model=copy.deepcopy(case.critic.classifier),
        train_dataset=Dataset.from_list([{"input_ids": prompt} for prompt in case.prompts]),
    )


def _answers(policy: Any, case: Case) -> Callable[..., SimpleNamespace]:
    """In place of `generate`: the case's responses, padded behind their end, with the logits the model has for them."""
    answers = dict(zip(map(tuple, case.prompts), case.responses, strict=True))

    def generate(input_ids: Tensor, attention_mask: Tensor, generation_config: Any, **_: Any) -> SimpleNamespace:
        rows = [ids[mask].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        responses = torch.tensor([_padded(answers[tuple(row)]) for row in rows])
        queries = input_ids.masked_fill(~attention_mask, PAD)
        output = ppo_trainer.forward(policy, torch.cat([queries, responses], 1), PAD)
        logits = output.logits[:, queries.shape[1] - 1 : -1] / generation_config.temperature
        return SimpleNamespace(sequences=torch.cat([input_ids, responses], 1), scores=logits.unbind(1))

    return generate


def _watch(watched: Watched, trainer: PPOTrainer, case: Case) -> None:
    modules = {"policy": trainer.model.policy, "critic": trainer.model.value_model}
    watched.weights.append(named_parameters(modules, lambda p: p))
    original = trainer.accelerator.backward

    def backward(loss: Tensor) -> None:
        seen = sys._getframe(1).f_locals
        watched.policy_losses.append(seen["pg_loss"].item())
        watched.value_losses.append(seen["vf_loss"].item())
        if len(watched.policy_losses) == 1:
            _note_batch(watched, seen, case)
        original(loss)

    optimizer = trainer.optimizer.optimizer
    optimizer.register_step_pre_hook(lambda *_: watched.gradients.append(named_parameters(modules, lambda p: p.grad)))
    optimizer.register_step_post_hook(lambda *_: watched.weights.append(named_parameters(modules, lambda p: p)))
    trainer.accelerator.backward = backward
    watched.figures = metrics = {}
    trainer.log = metrics.update


def _note_batch(watched: Watched, seen: dict[str, Any], case: Case) -> None:
    """TRL's rows in the case's order, 0 where it has its padding."""
    order = _order(seen["queries"], case.prompts)
    outside = seen["padding_mask"]
    for name in PER_TOKEN:
        # Rewards and values reach one place further: the first pad token behind an end token.
        kept = seen["padding_mask_p1"] if name in ("rewards", "values", "returns") else outside
        setattr(watched, name, seen[name].detach().masked_fill(kept, 0.0)[order])
    watched.scores = seen["scores"].detach().clone()[order]
    watched.kl = seen["kl"].sum(1).mean().item()


def _order(queries: Tensor, prompts: Sequence[list[int]]) -> list[int]:
    """Where the case's prompts are among TRL's rows."""
    places = {tuple(row[row != PAD].tolist()): place for place, row in enumerate(queries)}
    return [places[tuple(prompt)] for prompt in prompts]


def _padded(response: list[int]) -> list[int]:
    return [*response, *[PAD] * (RESPONSE - len(response))]
