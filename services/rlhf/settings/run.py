"""All sections together: what one TOML file may hold."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import model_validator

from rlhf.annotate.settings import AnnotateSettings
from rlhf.data.settings import DataSettings, WorldSettings
from rlhf.evaluate.settings import EvaluateSettings
from rlhf.feedback.settings import FeedbackSettings
from rlhf.policy.settings import PolicySettings, SampleSettings, SamplingSettings
from rlhf.ppo.settings import (
    CriticSettings,
    KlSettings,
    LoraSettings,
    MonitorSettings,
    PpoSettings,
    ReplaySettings,
    ShapingSettings,
)
from rlhf.preference.settings import RankSettings, RewardModelSettings
from rlhf.queues.settings import RedisSettings
from rlhf.reference.settings import ReferenceSettings
from rlhf.reward.settings import RewardSettings
from rlhf.rollouts.settings import RolloutsSettings
from rlhf.settings.paths import RunPaths
from rlhf.settings.section import Section
from rlhf.sft.settings import PretrainSettings, SftSettings
from rlhf.supervisor.settings import RunSettings


class Settings(Section):
    """One run. Every field is a section, `[name]` in the TOML file."""

    run: RunSettings = RunSettings()
    """The run as a whole."""
    redis: RedisSettings = RedisSettings()
    """Connection and streams."""
    data: DataSettings = DataSettings()
    """Real texts."""
    world: WorldSettings = WorldSettings()
    """The synthetic world of the demo."""
    pretrain: PretrainSettings = PretrainSettings()
    """Step 1: language modelling on texts."""
    sft: SftSettings = SftSettings()
    """Step 1: supervised fine-tuning."""
    sampling: SamplingSettings = SamplingSettings()
    """How completions are sampled, in steps 2 and 3 and in evaluation."""
    sample: SampleSettings = SampleSettings()
    """Step 2: completions to rank."""
    rank: RankSettings = RankSettings()
    """Step 2: simulated annotators."""
    annotate: AnnotateSettings = AnnotateSettings()
    """Step 2: the annotation page."""
    feedback: FeedbackSettings = FeedbackSettings()
    """Judgments from and to files, and rounds of them in step 3."""
    reward_model: RewardModelSettings = RewardModelSettings()
    """Step 2: the reward model."""
    policy: PolicySettings = PolicySettings()
    """Policy service."""
    reward: RewardSettings = RewardSettings()
    """Reward service."""
    reference: ReferenceSettings = ReferenceSettings()
    """Reference service."""
    rollouts: RolloutsSettings = RolloutsSettings()
    """Rollout worker."""
    ppo: PpoSettings = PpoSettings()
    """Step 3: the trainer."""
    lora: LoraSettings = LoraSettings()
    """Step 3: an adapter in place of the whole policy."""
    critic: CriticSettings = CriticSettings()
    """Step 3: the value function."""
    kl: KlSettings = KlSettings()
    """Step 3: the KL penalty."""
    shaping: ShapingSettings = ShapingSettings()
    """Step 3: from what is scored to what is learned."""
    monitor: MonitorSettings = MonitorSettings()
    """Step 3: what must hold while it trains."""
    replay: ReplaySettings = ReplaySettings()
    """A step computed again."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Before and after."""

    @model_validator(mode="after")
    def _equal_settings_can_make_equal_numbers(self) -> Settings:
        if self.run.deterministic:
            for name, holds, needed in self._needed_to_be_deterministic():
                if not holds:
                    raise ValueError(f"run.deterministic needs {name} {needed}")
        return self

    @model_validator(mode="after")
    def _rounds_refresh_a_model(self) -> Settings:
        if self.feedback.rounds and self.reward.rule:
            raise ValueError("feedback.rounds refreshes a reward model, and reward.rule is none; leave one of them out")
        return self

    def _needed_to_be_deterministic(self) -> Iterator[tuple[str, bool, str]]:
        """Settings by name, whether they are as needed, and what is needed."""
        yield "run.workers", self.run.workers == 1, "to be 1"
        yield "ppo.max_staleness", self.ppo.max_staleness == 0, "to be 0: which weights sample would be chance"
        yield "feedback.rounds", self.feedback.rounds == 0, "to be 0: when a refreshed reward model comes is chance"
        yield "ppo.threads", self.ppo.threads > 0, "above 0: sums depend on the number of threads"
        for name, section in (("policy", self.policy), ("reference", self.reference), ("reward", self.reward)):
            if name != "reward" or not self.reward.rule:
                # Who shares a batch is chance, and so is a sequence's place in it.
                yield f"{name}.threads", section.threads == 1, "to be 1: more of them round by the place in a batch"

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.run.folder / self.run.name)
