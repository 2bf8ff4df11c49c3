"""Experience: the completions of one step as flat tokens, and its cutting into padded micro-batches.

Shapes: `S` sequences, `N` tokens packed end to end, `B` sequences of a micro-batch, `T` tokens of its longest. `[B, T]`
exists only between `pad` and `pack`, around a call of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf.errors import RequestError
from rlhf.models.compute import torch_dtype
from rlhf.wire.blobs import read_blob
from rlhf.wire.records import Blob, Floats, HiddenStates, Rollout, ScoredCompletion


@dataclass(frozen=True)
class Experience:
    """What one optimisation step learns from. All tensors are on the CPU; a micro-batch moves to the device."""

    token_ids: Tensor
    """[N] int64, prompt and response of every sequence."""
    cu_seqlens: Tensor
    """[S + 1] int64; sequence i is [cu_seqlens[i], cu_seqlens[i + 1])."""
    response_mask: Tensor
    """[N] bool, True = sampled by the policy."""
    service_logprobs: Tensor
    """[N] float32, by the policy service; NaN outside the mask."""
    ref_logprobs: Tensor
    """[N] float32; NaN outside the mask, and everywhere where there are hidden states instead."""
    ref_hidden: Tensor | None
    """[sampled tokens, H]: of the state that each sampled token was predicted from, the reference's last hidden state,
    in its dtype. None: the reference gave log-probs."""
    scores: Tensor
    """[S] float32."""
    spreads: Tensor
    """[S] float32: standard deviation of the reward model's members on each; 0 of a single model."""
    token_rewards: Tensor
    """[N] float32; 0 where the reward service gave none."""
    ended_mask: Tensor
    """[S] bool, True = the policy ended the completion itself."""
    groups: Tensor
    """[S] int64, from 0: which prompt (rollout) each sequence answers."""
    texts: tuple[str, ...]
    """[S], of the completions."""

    def ref_hidden_of(self, positions: Tensor) -> Tensor | None:
        """[n, H]: rows of `ref_hidden` for sampled tokens at these positions of the N."""
        if self.ref_hidden is None:
            return None
        return self.ref_hidden[(self.response_mask.cumsum(0) - 1)[positions]]

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    @property
    def sequences(self) -> int:
        return len(self.scores)

    @property
    def last_response_index(self) -> Tensor:
        """[S] int64: where in the N tokens each sequence's last sampled token is."""
        positions = torch.where(self.response_mask, torch.arange(len(self.token_ids)), -1)
        return torch.stack([part.max() for part in torch.split(positions, self.lengths.tolist())])

    def sum_per_sequence(self, values: Tensor) -> Tensor:
        """[N] -> [S]: the sum over each sequence's sampled tokens."""
        masked = torch.where(self.response_mask, values, 0.0)
        return torch.stack([part.sum() for part in torch.split(masked, self.lengths.tolist())])


def gather(rollouts: Sequence[Rollout], blobs: Path | None = None) -> Experience:
    """All completions of the rollouts, in the given order.

    Args:
        blobs: folder of hidden states too large for a message; None: there are none.

    Raises:
        RlhfError: such a file is missing or damaged.
    """
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    return Experience(
        token_ids=_flat([c.token_ids for c in completions], np.int64),
        cu_seqlens=torch.tensor(np.cumsum([0, *(len(c.token_ids) for c in completions)])),
        response_mask=_flat([c.response_mask for c in completions], np.bool_),
        service_logprobs=_flat([c.logprobs for c in completions], np.float32),
        ref_logprobs=_flat([_ref_logprobs(c) for c in completions], np.float32),
        ref_hidden=_ref_hidden(completions, blobs),
        scores=torch.tensor([c.score for c in completions], dtype=torch.float32),
        spreads=torch.tensor([float(c.member_scores.std()) for c in completions], dtype=torch.float32),
        token_rewards=_flat([_token_rewards(c) for c in completions], np.float32),
        ended_mask=torch.tensor([c.finish_reason.ended for c in completions]),
        groups=torch.tensor([group for group, rollout in enumerate(rollouts) for _ in rollout.completions]),
        texts=tuple(c.text for c in completions),
    )


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences of an experience, right-padded to the longest of them."""

    indices: Tensor
    """[n] int64: the positions in the N tokens that these sequences fill, row after row."""
    place_mask: Tensor
    """[B, T] bool, True = a token, False = padding."""

    def sampled(self, response_mask: Tensor) -> Tensor:
        """[n] int64: which of the N tokens are sampled ones of this micro-batch, row after row.

        Args:
            response_mask: [N] bool.
        """
        return self.indices[response_mask[self.indices]]

    def pad(self, flat: Tensor, fill: float | int | bool = 0) -> Tensor:
        """[N] -> [B, T]"""
        padded = torch.full(self.place_mask.shape, fill, dtype=flat.dtype)
        padded[self.place_mask] = flat[self.indices]
        return padded

    def pack(self, padded: Tensor, flat: Tensor) -> None:
        """[B, T] -> its places in [N], written into `flat`."""
        flat[self.indices] = padded.cpu()[self.place_mask]


PASS_COSTS_TOKENS = 128
"""What a forward and backward pass costs beside its tokens, in tokens: 270, 130 and 80 on one core of an EPYC, for
models of 0.1, 1 and 4 million parameters. On a GPU reading the weights alone takes as long as computing with some
200."""


def minibatches(
    experience: Experience, count: int, micro_batch_tokens: int, order: Tensor
) -> Iterator[list[MicroBatch]]:
    """`count` minibatches of equal numbers of sequences, each as micro-batches of at most `micro_batch_tokens` padded
    tokens (one sequence at the least). The gradient of a minibatch is a sum over its sequences, whatever micro-batch
    they are in, so those of like length go together, and hardly anything is computed for padding.

    Args:
        order: [S] int64, the order in which sequences are dealt out; also decides among sequences of one length.
    """
    for part in order.tensor_split(count):
        yield [_micro_batch(experience, rows) for rows in _of_like_length(experience, part, micro_batch_tokens)]


def together(experience: Experience) -> MicroBatch:
    """All sequences, in their own order."""
    return _micro_batch(experience, list(range(experience.sequences)))


def _of_like_length(experience: Experience, rows: Tensor, micro_batch_tokens: int) -> Iterator[list[int]]:
    """From the longest on, a new micro-batch wherever the padding would cost more than another pass."""
    lengths = experience.lengths.tolist()
    taken: list[int] = []
    tokens = 0
    # Python's sort is stable, also in reverse.
    for row in sorted(rows.tolist(), key=lengths.__getitem__, reverse=True):
        padded = lengths[taken[0]] * (len(taken) + 1) if taken else 0
        if padded > micro_batch_tokens or padded - tokens - lengths[row] > PASS_COSTS_TOKENS:
            yield taken
            taken, tokens = [], 0
        taken.append(row)
        tokens += lengths[row]
    if taken:
        yield taken


def _micro_batch(experience: Experience, rows: list[int]) -> MicroBatch:
    starts, lengths = experience.cu_seqlens[rows], experience.lengths[rows]
    indices = torch.cat([torch.arange(s, s + n) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)])
    return MicroBatch(indices, torch.arange(int(lengths.max())) < lengths.unsqueeze(1))


def _token_rewards(completion: ScoredCompletion) -> Floats:
    if completion.token_rewards is None:
        return np.zeros(len(completion.token_ids), dtype=np.float32)
    return np.where(completion.response_mask, completion.token_rewards, np.float32(0.0))


def _ref_logprobs(completion: ScoredCompletion) -> Floats:
    if completion.ref_logprobs is None:
        return np.full(len(completion.token_ids), np.nan, np.float32)
    return completion.ref_logprobs


def _ref_hidden(completions: Sequence[ScoredCompletion], blobs: Path | None) -> Tensor | None:
    """
    Raises:
        RequestError: some completions have hidden states and some have none.
    """
    found = [c.ref_hidden for c in completions if c.ref_hidden is not None]
    if not found:
        return None
    if len(found) < len(completions):
        raise RequestError("rollouts with and without the reference's hidden states cannot make one batch")
    return torch.cat([_hidden_tensor(states, blobs) for states in found])


def _hidden_tensor(states: HiddenStates, blobs: Path | None) -> Tensor:
    """
    Raises:
        RlhfError: the file is missing or damaged, or there is no folder to find it in.
    """
    content = states.content
    if isinstance(content, Blob):
        if blobs is None:
            raise RequestError(f"hidden states lie in {content.uri}, and no folder of blobs is known here")
        content = read_blob(blobs, content)
    # A copy, because a tensor over read-only memory could be written to.
    return torch.frombuffer(bytearray(content), dtype=torch_dtype(states.dtype)).view(states.shape)


def _flat(arrays: Sequence[NDArray[Any]], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(array, dtype=dtype) for array in arrays]))
