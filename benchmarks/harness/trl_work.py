"""The work that this project and TRL are both given: models, prompts, sizes, and what it costs in operations.

No model here has an end token: then every response has its full length on both sides, and both read a score at its last
token.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from harness.model import words
from rlhf.models.causal import new_causal_lm, save_model
from rlhf.models.reward import RewardModel
from rlhf.models.tokenizer import train_tokenizer
from rlhf.sft.settings import PretrainSettings


@dataclass(frozen=True)
class Work:
    """Sizes and hyperparameters of both sides."""

    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    batch: int = 64
    prompt_tokens: int = 16
    response_tokens: int = 48
    epochs: int = 4
    prompts: int = 1024
    steps: int = 12
    """Of one run; the first is not timed."""
    lr: float = 3e-4
    adam_epsilon: float = 1e-5
    kl_coef: float = 0.05
    temperature: float = 1.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    attention: str = "eager"
    """transformers' implementation, wherever a model is trained; at 64 tokens on a CPU faster than `sdpa`."""
    threads: int = 2
    seed: int = 0

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Work:
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Folders:
    """Under one folder."""

    root: Path

    @property
    def policy(self) -> Path:
        return self.root / "policy"

    @property
    def reward_model(self) -> Path:
        """The reward model, from which the critic starts too."""
        return self.root / "reward-model"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"

    @property
    def work(self) -> Path:
        return self.root / "work.json"


def make(work: Work, folders: Folders) -> int:
    """Writes everything; returns the policy's parameters."""
    settings = PretrainSettings(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        layers=work.layers,
        heads=work.heads,
        context=128,
        sequence_length=64,
        seed=work.seed,
    )
    tokenizer = train_tokenizer(words(4000), work.vocab_size)
    assert len(tokenizer) == work.vocab_size
    model = new_causal_lm(settings, tokenizer)
    tokenizer.eos_token = None
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    folders.root.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, folders.policy)
    RewardModel.new(folders.policy, seed=work.seed).save(folders.reward_model, tokenizer)
    rows = [json.dumps({"prompt": text}) + "\n" for text in _prompts(work, tokenizer)]
    folders.prompts.write_text("".join(rows))
    work.write(folders.work)
    return sum(parameter.numel() for parameter in model.parameters())


def _prompts(work: Work, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Different texts of exactly that many tokens each."""
    random, found = np.random.default_rng(work.seed), dict[str, None]()
    known = " ".join(words(4000)).split()
    while len(found) < work.prompts:
        text = " ".join(random.choice(known, work.prompt_tokens))
        ids = tokenizer(text).input_ids[: work.prompt_tokens]
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if len(tokenizer(text).input_ids) == work.prompt_tokens:
            found[text] = None
    return list(found)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one step that no implementation can leave out: two for each weight of a matrix that
    a token meets, and attention over half the square of the sequence. A backward pass is twice its forward pass."""

    generate: float
    score: float
    """Reward model and reference."""
    train: float
    """Log-probs and values before the step, and the epochs."""

    @property
    def total(self) -> float:
        return self.generate + self.score + self.train


def operations(work: Work, intermediate_size: int) -> Operations:
    tokens = work.prompt_tokens + work.response_tokens
    matrices = work.layers * (4 * work.hidden_size**2 + 3 * work.hidden_size * intermediate_size)
    attention = work.layers * 2 * 2 * work.hidden_size * tokens**2 / 2
    trunk = work.batch * (2 * matrices * tokens + attention)
    head = work.batch * 2 * work.vocab_size * work.hidden_size * work.response_tokens
    both = 2 * trunk + head
    return Operations(generate=trunk + head, score=2 * trunk + head, train=(1 + 3 * work.epochs) * both)
