"""All sections together: what one TOML file may hold."""

from __future__ import annotations

from rlhf.data.settings import DataSettings, WorldSettings
from rlhf.evaluate.settings import EvaluateSettings
from rlhf.policy.settings import PolicySettings, SampleSettings, SamplingSettings
from rlhf.ppo.settings import CriticSettings, KlSettings, MonitorSettings, PpoSettings
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
    critic: CriticSettings = CriticSettings()
    """Step 3: the value function."""
    kl: KlSettings = KlSettings()
    """Step 3: the KL penalty."""
    monitor: MonitorSettings = MonitorSettings()
    """Step 3: what must hold while it trains."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Before and after."""

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.run.folder / self.run.name)
