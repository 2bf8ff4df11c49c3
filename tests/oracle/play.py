"""The real optimisation step in an enumerable world: rollouts drawn from the list of responses, gradients caught on
their way to the optimiser, and runs to a fixed point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from oracle.models import TableCritic, TablePolicy, hidden_table, log_table
from oracle.world import World, kl, response_logprobs
from rlhf.models.output_layer import output_layer
from rlhf.ppo.kl_control import KlController
from rlhf.ppo.learner import Learner, Targets
from rlhf.ppo.reference_layer import ReferenceLayer
from rlhf.ppo.settings import CriticSettings, KlSettings, PpoSettings
from rlhf.ppo.step import PpoStep, StepFigures
from rlhf.wire.records import FinishReason, HiddenStates, Rollout, ScoredCompletion
from support.rollouts import rollout, scored

PLAIN = {"epochs": 1, "whiten_advantages": False, "max_grad_norm": 1e9, "gae_lambda": 1.0}
"""One update for every batch, and nothing that scales the gradient: what the closed forms are derived for."""


@dataclass(repr=False)
class Trial:
    """A policy in a world, the trainer that improves it, and the tables that say where it is."""

    world: World
    step: PpoStep
    reference: nn.Module
    temperature: float
    generator: torch.Generator
    sampler: Tensor | None = None
    """[S, V]: log-probs of another policy that writes the responses. None: the policy itself does."""

    @property
    def policy(self) -> nn.Module:
        return self.step.learner.policy

    @property
    def log_p(self) -> Tensor:
        return log_table(self.policy, self.world, self.temperature).detach()

    @property
    def log_ref(self) -> Tensor:
        return log_table(self.reference, self.world, self.temperature).detach()

    def rollouts(self, prompts: int, completions: int = 1) -> list[Rollout]:
        """`prompts` rollouts for each of the world's prompts, drawn from the list of responses."""
        world, exact = self.world, self.step.kl.settings.exact
        log_p, log_ref = self.log_p if self.sampler is None else self.sampler, self.log_ref
        token_logprobs, ref_logprobs = (world.per_token(table).float() for table in (log_p, log_ref))
        hidden = hidden_table(self.reference, world) if exact else None
        drawn = torch.multinomial(
            response_logprobs(world, log_p).exp(), prompts * completions, replacement=True, generator=self.generator
        )
        made = []
        for x, chosen in enumerate(drawn.tolist()):
            known = {
                y: _completion(world, x, y, token_logprobs[x, y], ref_logprobs[x, y], hidden)
                for y in sorted(set(chosen))
            }
            for i in range(prompts):
                group = [known[y] for y in chosen[i * completions : (i + 1) * completions]]
                made.append(rollout(x * prompts + i, *group))
        return made

    def run(self, steps: int, prompts: int, completions: int = 1) -> list[StepFigures]:
        """Steps on fresh rollouts while the learning rates fall to 0, as `lr_schedule = "linear"` has them."""
        figures = []
        for i in range(steps):
            self.step.learner.set_learning_rates(1.0 - i / steps)
            figures.append(self.step(self.rollouts(prompts, completions)))
        return figures

    def gradients(self, completions: int = 1, batches: int = 32, responses: int = 192) -> Tensor:
        """[batches, parameters] float64: gradients of the policy's loss, summed over a response's tokens and averaged
        over responses (the trainer divides by the number of tokens), of independent batches of `responses` to each
        prompt. The weights stay.
        """
        learner = self.step.learner
        learner.set_learning_rates(0.0)
        parameters = list(self.policy.parameters())
        found: list[Tensor] = []

        def catch(*_: object) -> None:
            found.append(flat([p.grad for p in parameters]))

        hook = learner.optimizers["policy"].register_step_pre_hook(catch)
        for _ in range(batches):
            batch = self.rollouts(responses // completions, completions)
            self.step(batch)
            sampled = [int(c.response_mask.sum()) for r in batch for c in r.completions]
            found[-1] *= sum(sampled) / len(sampled)
        hook.remove()
        return torch.stack(found)

    def targets(self, batch: list[Rollout]) -> Targets:
        """What the trainer makes of a batch: its advantages and returns, before it improves anything."""
        learner, kept = self.step.learner, []
        improve = learner.improve
        learner.set_learning_rates(0.0)
        learner.improve = lambda experience, minibatch, targets: (  # type: ignore[method-assign]
            kept.append(targets) or improve(experience, minibatch, targets)
        )
        self.step(batch)
        learner.improve = improve  # type: ignore[method-assign]
        return kept[0]

    def distance(self, log_goal: Tensor) -> float:
        """KL(π_θ ‖ goal) in nats, the mean over prompts; log_goal: [X, Y]."""
        return kl(response_logprobs(self.world, self.log_p), log_goal).mean().item()


def new_trial(
    world: World,
    *,
    kl: KlSettings,
    policy: nn.Module | None = None,
    reference: nn.Module | None = None,
    log_ref: Tensor | None = None,
    log_p: Tensor | None = None,
    values: Tensor | None = None,
    critic: str = "separate",
    temperature: float = 1.0,
    seed: int = 0,
    critic_lr: float = 0.1,
    **settings: object,
) -> Trial:
    """
    Args:
        policy, reference: any models; or, of tables:
        log_ref, log_p: [S, V], the reference's log-probs, and the policy's where they differ from those.
        values: [S], what the critic says at first; None: 0.
    """
    if log_ref is not None:
        reference = TablePolicy(world, log_ref, temperature)
        policy = TablePolicy(world, log_ref if log_p is None else log_p, temperature)
    assert policy is not None
    assert reference is not None
    layer = output_layer(reference)  # type: ignore[arg-type]
    learner = Learner(
        policy,  # type: ignore[arg-type]
        TableCritic(world, values) if critic == "separate" else None,  # type: ignore[arg-type]
        PpoSettings(**{**PLAIN, "lr": 0.1, **settings}),  # type: ignore[arg-type]
        CriticSettings(kind=critic, lr=critic_lr),  # type: ignore[arg-type]
        kl,
        reference=ReferenceLayer(layer.weight.detach(), layer.bias, "") if kl.exact else None,
        temperature=temperature,
        pad_id=0,
    )
    step = PpoStep(learner, KlController(kl), torch.Generator().manual_seed(seed))
    return Trial(world, step, reference, temperature, torch.Generator().manual_seed(seed + 1))


def exact_gradient(trial: Trial, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """[parameters] float64: the gradient of a loss of log_p [S, V] in the policy's parameters, by autograd through the
    whole table."""
    parameters = list(trial.policy.parameters())
    value = loss(log_table(trial.policy, trial.world, trial.temperature))
    return flat(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))


def flat(tensors: object) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])  # type: ignore[attr-defined]


def _completion(
    world: World, x: int, y: int, logprobs: Tensor, ref_logprobs: Tensor, hidden: Tensor | None
) -> ScoredCompletion:
    response = world.responses[y]
    made = scored(
        [world.prompts[x], *response],
        1,
        score=world.scores[x, y].item(),
        logprobs=logprobs[: len(response)].tolist(),
        ref_logprobs=ref_logprobs[: len(response)].tolist(),
        finish_reason=FinishReason.EOS if response[-1] == 0 else FinishReason.LENGTH,
    )
    if hidden is None:
        return made
    rows = hidden[world.path[x, y, : len(response)]].contiguous()
    states = HiddenStates("float32", (rows.shape[0], rows.shape[1]), rows.numpy().tobytes())
    return replace(made, ref_logprobs=None, ref_hidden=states)
