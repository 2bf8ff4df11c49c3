"""TRL's PPOTrainer on the work of trl_work.py, as a process of its own in the environment that has TRL.

    .venv-trl/bin/python benchmarks/harness/trl_side.py FOLDER OUT.json

FOLDER is what `trl_work.make` wrote. OUT gets the seconds of every step and of its phases, the scores, and the peak of
memory. ACCELERATE_MIXED_PRECISION=bf16 in the environment is how `accelerate launch` asks for bfloat16; PPOConfig's own
`bf16` reaches nothing in TRL 1.12.0.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
sys.path.insert(1, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from harness.machine import peak_rss_mib
from harness.trl_work import Folders, Work


class Clock(TrainerCallback):
    """When each phase of each step ended."""

    def __init__(self) -> None:
        self.ends: dict[str, list[float]] = {"generate": [], "score": [], "step": []}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began_s = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends["step"].append(time.monotonic())

    def watch(self, name: str, phase: str, *, at_start: bool) -> None:
        """Notes when a function of TRL's module is called, or has returned."""
        original: Callable[..., Any] = getattr(ppo_trainer, name)

        def watched(*given: Any, **named: Any) -> Any:
            if at_start:
                self.ends[phase].append(time.monotonic())
            made = original(*given, **named)
            if not at_start:
                self.ends[phase].append(time.monotonic())
            return made

        setattr(ppo_trainer, name, watched)

    def seconds(self) -> dict[str, list[float]]:
        """Of each step but the first."""
        steps = self.ends["step"]
        began = [self.began_s, *steps[:-1]]
        generated, scored = self.ends["generate"], self.ends["score"]
        spans = {"generate": (began, generated), "score": (generated, scored), "train": (scored, steps)}
        found = {name: [b - a for a, b in zip(*pair, strict=True)] for name, pair in spans.items()}
        found["step"] = [b - a for a, b in zip(began, steps, strict=True)]
        return {name: values[1:] for name, values in found.items()}


def new_trainer(work: Work, folders: Folders, clock: Clock) -> PPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(folders.policy, padding_side="left")
    # TRL looks for an end token in every response; without a stop token it ends none.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)

    def policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(folders.policy, attn_implementation=work.attention)

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            folders.reward_model, num_labels=1, attn_implementation=work.attention
        )

    own = {
        "output_dir": str(folders.root / "trl"),
        "per_device_train_batch_size": work.batch,
        "local_rollout_forward_batch_size": work.batch,
        "total_episodes": work.batch * work.steps,
        "num_ppo_epochs": work.epochs,
        "response_length": work.response_tokens,
        "temperature": work.temperature,
        "kl_coef": work.kl_coef,
        "gamma": work.gamma,
        "lam": work.gae_lambda,
        "cliprange": work.clip_range,
        "learning_rate": work.lr,
        "adam_epsilon": work.adam_epsilon,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        # Memory is not short here, and it would cost a third more.
        "gradient_checkpointing": False,
        "num_sample_generations": 0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": work.seed,
    }
    return PPOTrainer(
        args=PPOConfig(**own),
        processing_class=tokenizer,
        model=policy(),
        ref_model=policy(),
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=_prompts(folders, tokenizer),
        callbacks=[clock],
    )


def _prompts(folders: Folders, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    texts = [json.loads(line)["prompt"] for line in folders.prompts.read_text().splitlines()]
    return Dataset.from_list([{"input_ids": tokenizer(text).input_ids} for text in texts])


def main() -> None:
    folders, out = Folders(Path(sys.argv[1])), Path(sys.argv[2])
    work = Work.read(folders.work)
    torch.set_num_threads(work.threads)
    warnings.simplefilter("ignore")
    clock, metrics = Clock(), list[dict[str, float]]()
    clock.watch("batch_generation", "generate", at_start=False)
    # The first thing that `train` does with whole advantages is to whiten them; the epochs follow.
    clock.watch("masked_whiten", "score", at_start=True)
    trainer = new_trainer(work, folders, clock)
    trainer.log = metrics.append
    trainer.train()
    result = {
        "seconds": clock.seconds(),
        "scores": [row["objective/scores"] for row in metrics],
        "kl": [row["objective/kl"] for row in metrics],
        "tokens": work.batch * (work.prompt_tokens + work.response_tokens),
        "parameters": sum(p.numel() for p in trainer.policy_model.parameters()),
        "peak_rss_mib": peak_rss_mib(os.getpid()),
        "precision": str(trainer.accelerator.mixed_precision),
    }
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
