"""Settings of step 3."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from rlhf.settings import Compute, Section

WITHOUT_CRITIC = ("rloo", "grpo", "reinforce++")
"""Estimators whose baseline comes from other completions."""
OF_GROUPS = ("rloo", "grpo")
"""Estimators that compare the completions of one prompt, each as a whole."""
WHITENED = ("gae", "reinforce++")
"""Estimators whose advantages are whitened where nothing else is set, as by their sources."""


class PpoSettings(Compute):
    model: Path | None = None
    """Folder of the causal language model to improve. None: the run's start model (run.model)."""
    prompts: Path | None = None
    """JSONL or Parquet of prompts. None: the run's data/prompts.jsonl."""
    out: Path | None = None
    """Folder of the finished policy. None: the run's policy/."""
    steps: PositiveInt = 40
    """Optimisation steps: batches of rollouts."""
    batch_prompts: PositiveInt = 64
    """Prompts per step."""
    completions: PositiveInt = 1
    """Completions per prompt."""
    epochs: PositiveInt = 4
    """Passes over each batch."""
    minibatches: PositiveInt = 1
    """Minibatches per pass, one optimiser step each."""
    micro_batch_tokens: PositiveInt = 16384
    """Padded tokens in one forward and backward pass, at most. Completions of like length share one."""
    max_staleness: NonNegativeInt = 0
    """How many optimisation steps old the weights behind a rollout may be. 0: strictly on-policy; more lets generation
    overlap training."""
    estimator: Literal["gae", "a2c", "rloo", "grpo", "reinforce++"] = "gae"
    """Where advantages come from: `gae`, PPO with a critic; `a2c`, a critic, one step and no clipping; `rloo`, a
    completion against the others of its prompt; `grpo`, against their mean and spread; `reinforce++`, against the
    batch. The last three have no critic."""
    grpo_std: bool = True
    """`grpo` divides by the standard deviation of a prompt's completions."""
    objective: Literal["ppo", "decoupled"] = "ppo"
    """`decoupled`: the clip holds the policy near that before the step, whose log-probs the trainer computes, and what
    older weights sampled counts by its importance; for max_staleness above 0."""
    importance_cap: float = Field(default=5.0, ge=1)
    """Largest weight of a token under the decoupled objective."""
    lr: PositiveFloat = 3e-4
    """Policy's learning rate."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """`linear` falls to 0 over `steps`."""
    adam_epsilon: PositiveFloat = 1e-5
    """Adam's epsilon, for policy and critic."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm, policy and critic apart."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda."""
    clip_range: PositiveFloat = 0.2
    """Ratio clip: 1 ± this."""
    clip_range_high: PositiveFloat | None = None
    """Upper ratio clip where it is another: 1 + this. None: `clip_range`."""
    dual_clip: PositiveFloat | None = None
    """A token whose advantage is negative costs at most this many times that advantage, however large its ratio. None:
    without a bound."""
    value_clip_range: PositiveFloat = 0.2
    """Value clip around the old value."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Entropy bonus."""
    whiten_advantages: bool | None = None
    """Advantages to mean 0 and variance 1 over the batch's response tokens. None: for `gae` and `reinforce++`, as their
    sources do."""
    whiten_rewards: bool = False
    """Rewards to variance 1, mean kept, over the batch's response tokens."""
    whiten_rewards_mean: bool = False
    """With `whiten_rewards`: to mean 0 too."""
    old_logprobs: Literal["recompute", "service"] = "recompute"
    """Denominator of the ratio: the trainer's own log-probs before the update (ratio exactly 1 at first), or the policy
    service's."""
    missing_eos_penalty: float | None = None
    """A completion that ended without an end token gets this: with `missing_eos = "subtract"` taken off its score, with
    "replace" instead of its score. None: nothing."""
    missing_eos: Literal["subtract", "replace"] = "subtract"
    """How `missing_eos_penalty` acts."""
    score_clip: PositiveFloat | None = None
    """Scores are clipped to ± this. None: not."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass rather than keep them: less memory, about a third more time."""
    attention: Literal["sdpa", "eager"] | None = None
    """Which of transformers' implementations policy and critic train with; None: its own choice, mostly `sdpa`. On a
    CPU in bfloat16 `eager` is faster for short sequences; its memory grows with the square of their length."""
    seed: NonNegativeInt = 0
    """Seed of prompt order, sampling and minibatches."""
    checkpoint_every: PositiveInt = 10
    """Steps between checkpoints; rollouts are acknowledged when the checkpoint that holds their effect is durable."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_weights: PositiveInt = 3
    """Newest published versions kept, beside any that a replica or a checkpoint holds."""
    keep_rollouts_mib: NonNegativeInt = 1024
    """Rollouts that were trained on are kept up to this size in MiB, compressed, the newest; for `rlhf replay`. 0:
    none."""
    keep_hidden_states: bool = False
    """Keep with them the reference's hidden states that were too large for a message; without, steps with exact KL that
    had such cannot be replayed."""
    snapshot_every: NonNegativeInt = 0
    """Steps between snapshots of the policy, for `rlhf evaluate --frontier`. 0: none."""
    keep_snapshots: PositiveInt = 16
    """Snapshots kept; of more, those are removed whose neighbours are closest together."""
    sample_every: PositiveInt = 5
    """Steps between sample tables."""
    rollout_timeout_s: PositiveFloat = 600.0
    """A step waits this long for a rollout before the trainer gives up and says what it waits for."""
    publish_timeout_s: PositiveFloat = 60.0
    """Deadline for a replica to prepare or commit weights."""
    max_prompt_attempts: PositiveInt = 3
    """Times a prompt may fail, at three tries each, before it is given up and the next one takes its place."""
    reference: str = "127.0.0.1:7103"
    """Address of the reference service, which is asked for its output layer where KL is exact."""
    reference_timeout_s: PositiveFloat = 300.0
    """Deadline for that."""
    blobs: Path | None = None
    """Folder of large hidden states, the same as the reference service's. None: the run's blobs/."""
    consumer: str = "trainer-0"
    """Stable name in the consumer group."""
    token_file: Path | None = None
    """File with the token that policy replicas ask for."""
    tls_ca: Path | None = None
    """PEM file with the authority that signed the replicas' certificates; set: connections use TLS."""

    @field_validator("dtype")
    @classmethod
    def _gradients_need_a_wide_range(cls, value: str) -> str:
        if value == "float16":
            raise ValueError("float16 gradients underflow without loss scaling; use float32 or bfloat16")
        return value

    @model_validator(mode="after")
    def _old_logprobs_fit_the_objective(self) -> PpoSettings:
        if self.objective == "decoupled" and self.old_logprobs == "service":
            raise ValueError(
                'objective = "decoupled" computes the log-probs before the step itself and reads the policy service\'s '
                'beside them, so old_logprobs = "service" contradicts it; leave it out'
            )
        if self.max_staleness > 0 and self.objective == "ppo" and self.old_logprobs == "recompute":
            raise ValueError(
                'max_staleness above 0 needs objective = "decoupled", or old_logprobs = "service": the ratio is to the '
                "policy that sampled, and recomputed log-probs are those of a later one"
            )
        return self

    @model_validator(mode="after")
    def _groups_have_others_to_compare_with(self) -> PpoSettings:
        if self.estimator in OF_GROUPS and self.completions < 2:
            raise ValueError(
                f'estimator = "{self.estimator}" compares the completions of a prompt, so completions must be at least '
                f"2; {self.completions} received"
            )
        if self.estimator in OF_GROUPS and self.gamma != 1:
            raise ValueError(
                f'estimator = "{self.estimator}" takes a completion as one action, so there is nothing to discount: '
                f"gamma must be 1; {self.gamma} received"
            )
        return self

    @model_validator(mode="after")
    def _actor_critic_makes_one_step(self) -> PpoSettings:
        if self.estimator != "a2c":
            return self
        for name in ("epochs", "minibatches"):
            if getattr(self, name) != 1:
                raise ValueError(
                    f'estimator = "a2c" makes one step on each batch, because nothing holds a second one near the '
                    f'policy that sampled: {name} must be 1; {getattr(self, name)} received. PPO is estimator = "gae"'
                )
        for name in ("dual_clip", "clip_range_high"):
            if getattr(self, name) is not None:
                raise ValueError(f'estimator = "a2c" does not clip, so {name} would do nothing; leave it out')
        if self.max_staleness > 0 and self.objective == "ppo":
            raise ValueError(
                'estimator = "a2c" has no ratio that would correct for older weights, so max_staleness above 0 needs '
                'objective = "decoupled"'
            )
        return self

    @model_validator(mode="after")
    def _a_mean_is_whitened_with_the_variance(self) -> PpoSettings:
        if self.whiten_rewards_mean and not self.whiten_rewards:
            raise ValueError("whiten_rewards_mean is a part of whiten_rewards, which is off; set both or neither")
        return self

    @model_validator(mode="after")
    def _dual_clip_lies_beyond_the_clip(self) -> PpoSettings:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.highest_clip_range:
            raise ValueError(
                f"dual_clip must be above 1 + the clip range, {1 + self.highest_clip_range:g}, or it would undo the "
                f"clip; {self.dual_clip:g} received"
            )
        return self

    @property
    def needs_critic(self) -> bool:
        return self.estimator not in WITHOUT_CRITIC

    @property
    def highest_clip_range(self) -> float:
        """The ratio is clipped at 1 + this."""
        return self.clip_range if self.clip_range_high is None else self.clip_range_high

    @property
    def whitens_advantages(self) -> bool:
        return self.estimator in WHITENED if self.whiten_advantages is None else self.whiten_advantages


class CriticSettings(Section):
    kind: Literal["separate", "shared"] = "separate"
    """A model of its own, or a second head on the policy's trunk."""
    init_from: Literal["reward-model", "policy"] = "reward-model"
    """Start of a separate critic: the reward model with its head, or the policy's trunk with a head of zeros."""
    model: Path | None = None
    """Folder of the reward model to start from. None: the run's reward-model/."""
    lr: PositiveFloat = 5e-4
    """Learning rate of a separate critic."""
    coef: PositiveFloat = 0.1
    """Weight of the value loss where the trunk is shared."""
    warmup_steps: NonNegativeInt = 0
    """Steps at the start in which the critic alone learns: a separate one, or the head on the shared trunk."""


class LoraSettings(Section):
    """Train an adapter on the policy, scaling · B·A beside each of its layers, and leave the model itself as it is."""

    rank: NonNegativeInt = 0
    """Rows of A and columns of B. 0: no adapter; the whole policy is trained."""
    alpha: PositiveInt = 16
    """The adapter counts alpha / rank times."""
    rslora: bool = False
    """alpha / √rank instead, so that a larger rank does not learn more slowly (arXiv:2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what A reads, in updates alone. Above 0 the first ratio is not 1."""
    target_modules: Literal["all-linear"] | tuple[str, ...] | None = None
    """Layers that get an adapter, by the end of their names; `all-linear`: every linear one but the output layer. None:
    as peft has it for the architecture, mostly the queries and values of attention."""


class ShapingSettings(Section):
    truncate_at: str | None = None
    """A completion is scored up to the first of these, itself included, and counts as ended there; the policy learns
    from all its tokens. As text: `.`, or a line's end. None: scored whole."""
    truncate_after: NonNegativeInt = 0
    """Characters at the start of a completion in which `truncate_at` is not looked for."""
    length_penalty: float = Field(default=0.0, ge=0)
    """Taken off a completion's score for each of its tokens beyond `length_free_tokens`."""
    length_free_tokens: NonNegativeInt = 0
    """Tokens that cost nothing."""
    spread_penalty: float = Field(default=0.0, ge=0)
    """Taken off a completion's score for each standard deviation by which the members of the reward model disagree on
    it; nothing with a single reward model."""

    @field_validator("truncate_at")
    @classmethod
    def _something_to_find(cls, value: str | None) -> str | None:
        if value == "":
            raise ValueError("is empty and would be found everywhere; leave it out to score whole completions")
        return value

    def truncates(self, completion: str) -> bool:
        return self.truncate_at is not None and self.truncate_at in completion[self.truncate_after :]

    def scored(self, completion: str) -> str:
        """What the reward model reads of it."""
        if self.truncate_at is None or not self.truncates(completion):
            return completion
        return completion[: completion.index(self.truncate_at, self.truncate_after) + len(self.truncate_at)]


class KlSettings(Section):
    coef: float = Field(default=0.1, ge=0)
    """Coefficient of the KL penalty, at the start where it adapts."""
    adaptive: bool = False
    """Steer the coefficient towards `target` (Ziegler et al. 2019, section 2.2)."""
    target: PositiveFloat = 6.0
    """Target of the adaptive controller: nats per sequence."""
    horizon: PositiveFloat = 10000.0
    """Horizon of the adaptive controller: completions."""
    estimator: Literal["k1", "k2", "k3", "abs", "exact"] = "k1"
    """Per-token KL(policy ‖ reference) that is subtracted from the reward: estimated from the sampled token, or
    `exact`, over the whole vocabulary, for which the reference service sends its hidden states, not log-probs. Only
    `k1` and `exact` have the gradient of the KL there: the others also punish a token for being rarer than in the
    reference, which makes it rarer still."""
    loss_coef: float = Field(default=0.0, ge=0)
    """Coefficient of a KL term in the loss, beside or instead of the penalty in the reward."""
    loss_estimator: Literal["k1", "k2", "k3", "abs", "exact"] = "k3"
    """KL of that term. `exact` and `k2` pull towards the reference in every state by itself, `k3` with the KL the other
    way round; the gradient of `k1` is 0 in expectation."""

    @model_validator(mode="after")
    def _adaptive_needs_a_start(self) -> KlSettings:
        if self.adaptive and self.coef == 0:
            raise ValueError("adaptive multiplies the coefficient, so coef must be above 0")
        return self

    @property
    def exact_loss(self) -> bool:
        """The loss needs the reference's whole distribution."""
        return self.loss_coef > 0 and self.loss_estimator == "exact"

    @property
    def exact(self) -> bool:
        """Reward or loss needs it, and so the reference's hidden states."""
        return self.estimator == "exact" or self.exact_loss


Action = Literal["warn", "stop", "off"]
"""What a diagnosis leads to: a warning, an end of the run before its next checkpoint, or nothing."""


class MonitorSettings(Section):
    """One field for each diagnosis, then the bounds. `rlhf.ppo.invariants` holds what each of them looks at."""

    first_ratio: Action = "warn"
    """The probability ratio is not 1 before the first update."""
    start_kl: Action = "warn"
    """Policy and reference differ before the first step."""
    policy_logprobs: Action = "warn"
    """The policy service's log-probs are not the trainer's, for the same weights."""
    sampling: Action = "stop"
    """A rollout was sampled at another temperature than the trainer computes with, or through a filter."""
    tokenizer: Action = "stop"
    """A completion's tokens are not its text in the trainer's tokenizer."""
    padding: Action = "stop"
    """Tokens behind an end token count as sampled."""
    replica_weights: Action = "warn"
    """A policy replica holds other weights than those just published."""
    entropy: Action = "warn"
    """The mean entropy is below 0 or above that of a uniform distribution."""
    negative_kl: Action = "warn"
    """The KL to the reference is negative beyond chance."""
    explained_variance: Action = "warn"
    """The critic foresees less than a constant would."""
    clip_fraction: Action = "warn"
    """Too many tokens reach the clip."""
    gradient: Action = "warn"
    """A gradient's norm leaps, or stays 0."""
    length: Action = "warn"
    """Scores rise while completions grow out of proportion, or stop ending by themselves."""
    ngrams: Action = "warn"
    """Completions become alike: distinct pairs of tokens vanish."""
    logprob_bound: PositiveFloat | None = None
    """Largest |difference| of two computations of one log-prob, in nats; their mean may be a tenth. None: of the
    coarsest dtype among trainer and services, 0.001 for float32, 0.5 for bfloat16 and float16."""
    window: PositiveInt = 5
    """Steps that are averaged, at the start of the run and up to now, before they are compared: single steps are
    noise."""
    negative_kl_sigmas: PositiveFloat = 5.0
    """Standard errors by which the mean KL may lie below 0. Sums over completions have long tails, so 3 would be too
    few."""
    explained_variance_min: float = Field(default=-0.2, le=1)
    """Least median over the window, once four windows have passed. At 0 the critic knows as much as a constant, and a
    small batch measures it to some ± 0.2."""
    clip_fraction_max: float = Field(default=0.3, gt=0, le=1)
    """Largest median over the window. Beyond it a third of the batch has no gradient any more."""
    gradient_factor: float = Field(default=10.0, gt=1)
    """Largest norm, in medians of the window before. Between steps of one run it varies threefold."""
    score_rise: float = Field(default=0.5, ge=0)
    """From when on scores count as risen: standard deviations of the scores at the start."""
    length_factor: float = Field(default=2.0, gt=1)
    """Most that completions may grow, and that the share that ends by itself may shrink, against the start."""
    ngram_factor: float = Field(default=2.0, gt=1)
    """Most that the share of distinct token pairs may shrink against the start. Learning a taste costs a third."""
    probe_every: NonNegativeInt = 10
    """Steps between probes, in which each policy replica completes one prompt on the weights just published, to compare
    its log-probs with the trainer's. 0: none."""


class ReplaySettings(Section):
    """`rlhf replay`."""

    step: NonNegativeInt = 0
    """Step to compute again, as metrics.jsonl counts them. 0: the newest that can be."""
    reward_model: Path | None = None
    """Folder of another reward model, to see what its scores would have changed."""
    reward_rule: str = ""
    """A rule, as in reward.rule, for the same."""
