"""The model that generation is measured with: a Llama of about 4 million random parameters, and its prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.models.causal import new_causal_lm, save_model
from rlhf.models.tokenizer import train_tokenizer
from rlhf.sft.settings import PretrainSettings
from rlhf.wire.records import Tokens

CONTEXT = 256
PROMPT_TOKENS = (8, 32)
MEAN_NEW_TOKENS, MAX_NEW_TOKENS = 48, 192


@dataclass(frozen=True)
class Ask:
    """One completion to generate."""

    prompt: Tokens
    """[P]"""
    new_tokens: int
    """Exactly; end tokens do not end it."""
    seed: int


def make_model(folder: Path, *, quick: bool) -> int:
    """Writes a `from_pretrained` folder; returns the parameters.

    Random weights cost what trained ones do, and sample from all of the vocabulary.
    """
    settings = PretrainSettings(
        vocab_size=512 if quick else 4096,
        hidden_size=16 if quick else 256,
        layers=1 if quick else 4,
        heads=2 if quick else 4,
        context=CONTEXT,
        seed=0,
    )
    tokenizer = train_tokenizer(words(4000), settings.vocab_size)
    model = new_causal_lm(settings, tokenizer)
    assert len(tokenizer) == settings.vocab_size
    save_model(model, tokenizer, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def asks(count: int, *, vocab_size: int, seed: int = 0, longest: int = MAX_NEW_TOKENS) -> list[Ask]:
    """Prompts of 8 to 32 random tokens; response lengths geometric with mean 48, cut at `longest`."""
    random = np.random.default_rng(seed)
    lengths = np.minimum(random.geometric(1 / MEAN_NEW_TOKENS, count), longest)
    prompts = random.integers(*PROMPT_TOKENS, size=count, endpoint=True)
    return [
        Ask(random.integers(258, vocab_size, size=prompt).astype(np.int32), int(length), number)
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def words(count: int) -> list[str]:
    """Enough different words for a tokenizer of that size."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return [" ".join("".join(random.choice(letters, 6)) for _ in range(5)) for _ in range(count)]
