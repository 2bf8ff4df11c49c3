"""The run folder: where each stage leaves its result and finds the one before. One run, one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """Places in `runs/<name>/`. Stages take these where their section names no other place."""

    folder: Path

    @property
    def settings(self) -> Path:
        """The settings as the run was started with them (JSON)."""
        return self.folder / "settings.json"

    @property
    def texts(self) -> Path:
        """JSONL of `{"text"}` for pretraining."""
        return self.folder / "data" / "texts.jsonl"

    @property
    def heldout_texts(self) -> Path:
        """JSONL of `{"text"}` for perplexity."""
        return self.folder / "data" / "heldout_texts.jsonl"

    @property
    def prompts(self) -> Path:
        """JSONL of `{"prompt", …}` for sampling and PPO."""
        return self.folder / "data" / "prompts.jsonl"

    @property
    def heldout_prompts(self) -> Path:
        """JSONL of `{"prompt", …}` that only evaluation sees."""
        return self.folder / "data" / "heldout_prompts.jsonl"

    @property
    def validation_prompts(self) -> Path:
        """JSONL of `{"prompt", …}` to choose settings by: of held-out texts, but none of `heldout_prompts`."""
        return self.folder / "data" / "validation_prompts.jsonl"

    @property
    def annotators_labelled(self) -> Path:
        """JSONL of `{"text", "label"}` from which the taste of simulated annotators is fitted; none of `labelled`."""
        return self.folder / "data" / "annotators_labelled.jsonl"

    @property
    def labelled(self) -> Path:
        """JSONL of `{"text", "label"}` from which the judge is fitted."""
        return self.folder / "data" / "labelled.jsonl"

    @property
    def pretrained(self) -> Path:
        """Step 1: a `from_pretrained` folder with its tokenizer."""
        return self.folder / "pretrained"

    @property
    def sft(self) -> Path:
        """Step 1: the model fine-tuned on demonstrations."""
        return self.folder / "sft"

    @property
    def samples(self) -> Path:
        """Step 2: JSONL, one prompt with K completions a row."""
        return self.folder / "samples.jsonl"

    @property
    def heldout_samples(self) -> Path:
        """Step 2: the same of held-out prompts."""
        return self.folder / "heldout_samples.jsonl"

    @property
    def heldout_comparisons(self) -> Path:
        """Step 2: JSONL, the simulated annotators' noise-free ranking of the completions of a held-out prompt a row."""
        return self.folder / "heldout_comparisons.jsonl"

    @property
    def comparisons(self) -> Path:
        """Step 2: JSONL, one annotator's ranking of one prompt's completions a row."""
        return self.folder / "comparisons.jsonl"

    @property
    def annotations(self) -> Path:
        """Step 2: the annotation page's database (SQLite), unless it has another."""
        return self.folder / "annotate.db"

    @property
    def feedback(self) -> Path:
        """Step 2: the snapshot of judgments that `rlhf feedback` keeps, a folder."""
        return self.folder / "feedback"

    @property
    def reward_model(self) -> Path:
        """Step 2: a `from_pretrained` folder of a sequence classifier with one label."""
        return self.folder / "reward-model"

    @property
    def weights(self) -> Path:
        """Step 3: published versions, one folder `<epoch>-<step>` each."""
        return self.folder / "weights"

    @property
    def blobs(self) -> Path:
        """Step 3: hidden states too large for a message, on their way from the reference service to the trainer."""
        return self.folder / "blobs"

    @property
    def checkpoints(self) -> Path:
        """Step 3: the trainer's checkpoints, one folder `<number>-<step>` each."""
        return self.folder / "checkpoints"

    @property
    def policy(self) -> Path:
        """Step 3: the finished policy, a `from_pretrained` folder with its tokenizer."""
        return self.folder / "policy"

    @property
    def snapshots(self) -> Path:
        """Step 3: the policy every few steps, one `from_pretrained` folder `<step>` each."""
        return self.folder / "snapshots"

    @property
    def metrics(self) -> Path:
        """Step 3: JSONL, one optimisation step a row."""
        return self.folder / "metrics.jsonl"

    @property
    def trained(self) -> Path:
        """Step 3: JSONL, the rollout ids that each optimisation step trained on, by epoch; what the audit reads."""
        return self.folder / "trained.jsonl"

    @property
    def history(self) -> Path:
        """Step 3: every rollout that was trained on, one file a step, for `rlhf replay`."""
        return self.folder / "history"

    @property
    def sample_tables(self) -> Path:
        """Step 3: completions with their scores, one JSONL file every few steps."""
        return self.folder / "samples"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def rounds(self) -> Path:
        """Step 3: rounds of feedback, one folder `<n>` each."""
        return self.folder / "rounds"

    @property
    def reward_in_service(self) -> Path:
        """Step 3: JSON, the refreshed reward model that the reward service holds; missing while it is the first."""
        return self.rounds / "reward-model.json"

    @property
    def rounds_finished(self) -> Path:
        """Step 3: there once every round is done."""
        return self.rounds / "finished.json"

    @property
    def logs(self) -> Path:
        """One file per process."""
        return self.folder / "logs"

    @property
    def redis(self) -> Path:
        """The embedded Redis: its data, and `address.json` while it runs."""
        return self.folder / "redis"

    @property
    def lock(self) -> Path:
        """Held by the supervisor of the run."""
        return self.folder / "run.lock"

    @property
    def processes(self) -> Path:
        """JSON: the processes that the supervisor keeps alive, while it does."""
        return self.folder / "processes.json"

    @property
    def stages(self) -> Path:
        """One JSON file per finished stage: what it measured, how long it took, and the settings it ran with."""
        return self.folder / "stages"

    @property
    def evaluation(self) -> Path:
        """JSON: before and after on the held-out prompts."""
        return self.folder / "evaluation.json"

    @property
    def frontier(self) -> Path:
        """JSON: reward and judge against the distance from the initial policy."""
        return self.folder / "frontier.json"

    @property
    def summary(self) -> Path:
        """JSON: the figures of the table that `run` ends with."""
        return self.folder / "summary.json"

    @property
    def report(self) -> Path:
        """HTML with plots and samples."""
        return self.folder / "report.html"
