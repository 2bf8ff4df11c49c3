"""From logits to tokens and their log-probs, for all rows of a step at once.

The random number behind token t of a completion is a hash of (seed, t) and nothing else (SplitMix64: Steele, Lea and
Flood 2014, "Fast splittable pseudorandom number generators"), and it picks the token by inverting the cumulative
distribution. So neighbours in the batch, the batch's size and the order of arrival change nothing; what remains is that
matrix products of other sizes round differently in the last bits, which moves a token only if its random number lies
within those bits of a border.

The order of changes to the logits is the usual one: repetition penalty, forbidden end tokens, temperature, top-k,
top-p, min-p. Rows without any of them but the temperature take the short way. Log-probs are those of
`rlhf.ops.logprobs_from_logits`; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf.policy.engine import SEEDS
from rlhf.wire.records import LogprobMode, Sampling, Tokens

_LARGEST_BELOW_ONE = 1.0 - 2.0**-52
_BLOCK = 128


@dataclass(frozen=True)
class SamplerRow:
    """What the sampler needs to know about one completion."""

    seed: int
    sampling: Sampling
    logprob_mode: LogprobMode
    min_new_tokens: int
    end_token_ids: frozenset[int]
    """Forbidden until `min_new_tokens` are sampled."""


class Sampler:
    """The sampling of the rows of one batch. Made anew when a row joins or leaves."""

    def __init__(self, rows: Sequence[SamplerRow], present: Sequence[Tokens], vocab_size: int, device: str) -> None:
        """
        Args:
            rows: [B].
            present: [B], prompt and response so far of each row, for the repetition penalty.
        """
        self._device = device
        self._seeds = np.array([row.seed % SEEDS for row in rows], dtype=np.uint64)
        greedy = [row.sampling.temperature == 0 for row in rows]
        temperatures = [row.sampling.temperature or 1.0 for row in rows]
        self._greedy = self._tensor(greedy) if any(greedy) else None
        self._temperatures = self._tensor(temperatures)[:, None] if set(temperatures) != {1.0} else None
        self._raw = self._rows_where([row.logprob_mode is LogprobMode.RAW for row in rows])
        self._changed = [i for i, row in enumerate(rows) if _changes_more_than_temperature(row)]
        if self._changed:
            chosen = [rows[i] for i in self._changed]
            self._changed_rows = self._tensor(self._changed)
            self._processed = self._tensor([row.logprob_mode is LogprobMode.PROCESSED for row in chosen])
            self._changes = _Changes(chosen, [present[i] for i in self._changed], vocab_size, device)

    def sample(self, logits: Tensor, steps: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """
        Args:
            logits: [B, V], floating.
            steps: int64 [B], tokens that each row has sampled already.

        Returns:
            Tokens, int64 [B], and their log-probs, float32 [B], in each row's mode (not finite where the logits are
            not; mode NONE takes TEMPERATURE's).
        """
        logits = logits.float()
        scaled = logits if self._temperatures is None else logits / self._temperatures
        log_p = torch.log_softmax(scaled, dim=-1)
        sampled_log_p = log_p
        if self._changed:
            changed = self._changes.apply(logits[self._changed_rows], steps[self._changed])
            sampled_log_p = log_p.index_copy(0, self._changed_rows, changed)
        tokens = self._draw(sampled_log_p, steps)
        logprobs = log_p.gather(-1, tokens[:, None])[:, 0]
        if self._changed:
            self._changes.note(tokens[self._changed_rows])
            own = sampled_log_p.gather(-1, tokens[:, None])[self._changed_rows, 0]
            logprobs[self._changed_rows] = torch.where(self._processed, own, logprobs[self._changed_rows])
        if self._raw is not None and self._temperatures is not None:
            raw = torch.log_softmax(logits[self._raw], dim=-1)
            logprobs[self._raw] = raw.gather(-1, tokens[self._raw, None])[:, 0]
        return tokens, logprobs

    def _draw(self, log_p: Tensor, steps: NDArray[np.int64]) -> Tensor:
        tokens = pick(log_p.exp(), torch.from_numpy(uniforms(self._seeds, steps)).to(self._device))
        return tokens if self._greedy is None else torch.where(self._greedy, log_p.argmax(-1), tokens)

    def _tensor(self, values: Sequence[float] | Sequence[int] | Sequence[bool]) -> Tensor:
        return torch.tensor(values, device=self._device)

    def _rows_where(self, chosen: list[bool]) -> Tensor | None:
        return self._tensor([i for i, yes in enumerate(chosen) if yes]) if any(chosen) else None


class _Changes:
    """Repetition penalty, forbidden end tokens and filters, of the R rows that have any."""

    def __init__(self, rows: Sequence[SamplerRow], present: Sequence[Tokens], vocab_size: int, device: str) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        self._temperatures = column([row.sampling.temperature or 1.0 for row in rows])
        self._penalties = column([row.sampling.repetition_penalty for row in rows])
        self._top_k = column([row.sampling.top_k or vocab_size for row in rows])
        self._top_p = column([row.sampling.top_p for row in rows])
        self._min_p = column([row.sampling.min_p for row in rows])
        self._filters = any(row.sampling.top_k or row.sampling.top_p < 1 or row.sampling.min_p > 0 for row in rows)
        self._min_new_tokens = np.array([row.min_new_tokens for row in rows])
        self._end_mask = _marked([sorted(row.end_token_ids) for row in rows], vocab_size, device)
        self._present_mask = _marked(present, vocab_size, device)

    def apply(self, logits: Tensor, steps: NDArray[np.int64]) -> Tensor:
        """Log-probs [R, V] of the distributions to sample from, -inf for what cannot be sampled."""
        penalised = torch.where(logits > 0, logits / self._penalties, logits * self._penalties)
        logits = torch.where(self._present_mask, penalised, logits)
        too_early = torch.from_numpy(steps < self._min_new_tokens).to(logits.device)
        logits = logits.masked_fill(self._end_mask & too_early[:, None], -torch.inf)
        logits = logits / self._temperatures
        if self._filters:
            logits = filtered(logits, self._top_k, self._top_p, self._min_p)
        return torch.log_softmax(logits, dim=-1)

    def note(self, tokens: Tensor) -> None:
        """tokens: int64 [R], sampled."""
        self._present_mask.scatter_(1, tokens[:, None], True)


def filtered(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits with -inf for the tokens that the filters drop; the likeliest token always stays.

    top-k keeps the k likeliest. top-p then keeps the fewest likeliest of those that together have at least this
    probability (Holtzman et al. 2020, "The curious case of neural text degeneration"). min-p drops what has less than
    this share of the likeliest token's probability.

    Args:
        logits: [R, V], temperature applied.
        top_k, top_p, min_p: [R, 1].
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(rank >= top_k, -torch.inf)
    p = torch.softmax(ordered, dim=-1)
    likelier = p.cumsum(-1) - p
    # At top_p = 1 rounding could put the sum before the last tokens at 1 and drop them.
    drop_mask = ((likelier >= top_p) & (top_p < 1)) | (p < min_p * p[:, :1])
    drop_mask[:, 0] = False
    return torch.full_like(logits, -torch.inf).scatter(-1, order, ordered.masked_fill(drop_mask, -torch.inf))


def pick(p: Tensor, u: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes u; never one with p = 0.

    In two levels, first a block of tokens and then a token in it, since a float32 running sum over a large vocabulary
    loses the small probabilities and a float64 one costs as much as the rest of the sampler.

    Args:
        p: float32 [B, V], not negative; need not sum to 1 exactly.
        u: float64 [B] in [0, 1 - 2^-52].

    Returns:
        int64 [B].
    """
    if p.shape[1] <= _BLOCK:
        return _invert(p, u)[0]
    blocks = torch.nn.functional.pad(p, (0, -p.shape[1] % _BLOCK)).view(p.shape[0], -1, _BLOCK)
    block, rest = _invert(blocks.sum(-1), u)
    chosen = blocks[torch.arange(p.shape[0], device=p.device), block]
    # Without numbers (NaN) any token does, as long as it is one: the row's log-prob will tell.
    return (block * _BLOCK + _invert(chosen, rest)[0]).clamp_(max=p.shape[1] - 1)


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The index at which the running sum of weights [B, N] passes the share u of the total, and how far into it."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = u[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(-1, index).double()
    into = (target - cumulative.gather(-1, index) + weight) / weight
    return index[:, 0], into[:, 0].clamp(0.0, _LARGEST_BELOW_ONE)


def uniforms(seeds: NDArray[np.uint64], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1 - 2^-52] for each pair; a pair's number depends on nothing but the pair."""
    mixed = _mix(_mix(seeds) + steps.astype(np.uint64))
    # 52 bits: the largest number times any total stays below that total in float64.
    return (mixed >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's step and finaliser, modulo 2^64."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _marked(token_ids: Sequence[Sequence[int] | Tokens], vocab_size: int, device: str) -> Tensor:
    """bool [R, V], True at each row's ids."""
    mask = np.zeros((len(token_ids), vocab_size), dtype=np.bool_)
    for row, ids in zip(mask, token_ids, strict=True):
        row[np.asarray(ids, dtype=np.int64)] = True
    return torch.from_numpy(mask).to(device)


def _changes_more_than_temperature(row: SamplerRow) -> bool:
    s = row.sampling
    return bool(s.top_k or s.top_p < 1 or s.min_p > 0 or s.repetition_penalty != 1 or row.min_new_tokens)
