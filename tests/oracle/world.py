"""Worlds small enough to know everything about: every response is listed, and expectations are sums over the list.

A world has `V` tokens, token 0 ends a response, and a response that has not ended after `L` tokens is cut there. With
`X` prompts there are `Y` responses to each, the same ones, and `S` states: a prompt and what was written so far.

        prompt ──a──▶ state ──b──▶ state ──0──▶ over          a policy is a table log_p [S, V] of log-probs
           │                                                  a response is a path of states and tokens
           └──0──▶ over                                       its score is paid with its last token

Nothing here calls the trainer or the ops it uses: this is what they are compared with. All is float64, and all of it is
differentiable in log_p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

END = 0


@dataclass(frozen=True)
class World:
    """What can be written, and what it is worth."""

    vocabulary: int
    longest: int
    prompts: tuple[int, ...]
    """One token each."""
    responses: tuple[tuple[int, ...], ...]
    states: tuple[tuple[int, tuple[int, ...]], ...]
    """(number of the prompt, tokens so far), shorter ones first; the first X are the prompts alone."""
    next_state: Tensor
    """[S + 1, V] int64: where a token leads. S means that the response is over, and nothing leads out of there."""
    path: Tensor
    """[X, Y, L] int64: the state before each token of a response; S behind its end."""
    tokens: Tensor
    """[Y, L] int64: each response's tokens; 0 behind its end."""
    token_mask: Tensor
    """[Y, L] bool, True = a token of the response."""
    scores: Tensor
    """[X, Y] float64."""

    @property
    def over(self) -> int:
        return len(self.states)

    @property
    def lengths(self) -> Tensor:
        """[Y]"""
        return self.token_mask.sum(-1)

    @property
    def cut_mask(self) -> Tensor:
        """[Y] bool, True = the response was cut at the longest length without an end."""
        return torch.tensor([response[-1] != END for response in self.responses])

    def per_token(self, table: Tensor) -> Tensor:
        """[S, V] -> [X, Y, L]: the table's entry for every token of every response, 0 behind its end."""
        entries = torch.nn.functional.pad(table, (0, 0, 0, 1))[self.path, self.tokens]
        return torch.where(self.token_mask, entries, 0.0)

    def per_state(self, values: Tensor) -> Tensor:
        """[S] -> [X, Y, L]: the value of the state before every token, 0 behind the end."""
        return torch.nn.functional.pad(values, (0, 1))[self.path]

    @property
    def score_table(self) -> Tensor:
        """[S, V]: the score of the response that this token completes in this state; 0 where it goes on."""
        table = torch.zeros(self.over, self.vocabulary, dtype=torch.float64)
        last = self.lengths - 1
        rows = torch.arange(len(self.responses))
        table[self.path[:, rows, last], self.tokens[rows, last]] = self.scores
        return table


def new_world(
    *, vocabulary: int = 4, longest: int = 3, prompts: Sequence[int] = (1, 2), seed: int = 0, spread: float = 1.0
) -> World:
    """With scores drawn from [0, spread)."""
    responses = tuple(_responses(vocabulary, longest))
    prefixes = sorted({response[:t] for response in responses for t in range(len(response))}, key=lambda p: (len(p), p))
    states = tuple((x, prefix) for prefix in prefixes for x in range(len(prompts)))
    index = {state: i for i, state in enumerate(states)}
    over = len(states)
    next_state = [[index.get((x, (*so_far, token)), over) for token in range(vocabulary)] for x, so_far in states]
    tokens = torch.zeros(len(responses), longest, dtype=torch.int64)
    token_mask = torch.zeros(len(responses), longest, dtype=torch.bool)
    path = torch.full((len(prompts), len(responses), longest), over)
    for y, response in enumerate(responses):
        tokens[y, : len(response)] = torch.tensor(response)
        token_mask[y, : len(response)] = True
        for x in range(len(prompts)):
            path[x, y, : len(response)] = torch.tensor([index[x, response[:t]] for t in range(len(response))])
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.rand(len(prompts), len(responses), dtype=torch.float64, generator=generator)
    return World(
        vocabulary,
        longest,
        tuple(prompts),
        responses,
        states,
        torch.tensor([*next_state, [over] * vocabulary]),
        path,
        tokens,
        token_mask,
        scores,
    )


def _responses(vocabulary: int, longest: int, so_far: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    for token in range(vocabulary):
        response = (*so_far, token)
        if token == END or len(response) == longest:
            yield response
        else:
            yield from _responses(vocabulary, longest, response)


def random_table(world: World, *, seed: int, spread: float = 1.0) -> Tensor:
    """[S, V]: log-probs of a policy with normally distributed logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(world.over, world.vocabulary, dtype=torch.float64, generator=generator)
    return torch.log_softmax(spread * logits, -1)


def response_logprobs(world: World, log_p: Tensor) -> Tensor:
    """[X, Y]: log π(y | x) = Σ_t log π(y_t | s_t)."""
    return world.per_token(log_p).sum(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Σ a (log a - log b) over the last dimension: of responses [X, Y] -> [X], or of tokens [S, V] -> [S]."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def optimum(world: World, log_ref: Tensor, beta: float) -> Tensor:
    """[X, Y]: log π*(y | x) with π* ∝ π_ref exp(score / β), the policy of the highest E[score] - β KL(π ‖ π_ref)."""
    return torch.log_softmax(response_logprobs(world, log_ref) + world.scores / beta, -1)


def objective(world: World, log_p: Tensor, log_ref: Tensor, beta: float) -> Tensor:
    """E[score] - β KL(π ‖ π_ref), the mean over prompts: what PPO from human feedback climbs."""
    log_y, log_ref_y = response_logprobs(world, log_p), response_logprobs(world, log_ref)
    return (log_y.exp() * (world.scores - beta * (log_y - log_ref_y))).sum(-1).mean()


def action_values(world: World, log_p: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Q [S, V] and V [S] of a policy, backwards from the ends: Q(s, a) = r(s, a) + V(s'), V(s) = Σ_a π(a | s) Q(s, a).

    Args:
        rewards: [S, V], of each token in each state.
    """
    return _backwards(world, rewards, lambda s, q: (log_p[s].exp() * q).sum())


def backwards_policy(world: World, rewards: Tensor, policy: object) -> Tensor:
    """[S, V]: log-probs of the policy that is in every state `policy(state, Q of the state)`, with Q(s, a) the rewards
    to be expected from a on under that same policy. So a fixed point that is known state by state becomes known for
    the whole world.
    """
    assert callable(policy)
    rows: dict[int, Tensor] = {}

    def value(s: int, q: Tensor) -> Tensor:
        rows[s] = policy(s, q)
        return (rows[s].exp() * q).sum()

    _backwards(world, rewards, value)
    return torch.stack([rows[s] for s in range(world.over)])


def _backwards(world: World, rewards: Tensor, value: object) -> tuple[Tensor, Tensor]:
    assert callable(value)
    values = [torch.zeros((), dtype=torch.float64)] * (world.over + 1)
    q = [torch.empty(0)] * world.over
    for s in reversed(range(world.over)):
        q[s] = rewards[s] + torch.stack([values[i] for i in world.next_state[s].tolist()])
        values[s] = value(s, q[s])
    return torch.stack(q), torch.stack(values[:-1])


def rest_with_forward_kl(log_ref: Tensor, q: Tensor, beta: float) -> Tensor:
    """[V]: log-probs of argmax_π Σ π q - β KL(π_ref ‖ π).

    With a multiplier λ for Σ π = 1, q + β π_ref / π = λ, so π = β π_ref / (λ - q). λ lies above max q and is found by
    halving: Σ π falls as λ grows, from infinity to at most 1 at max q + β.
    """
    weights, values = (beta * log_ref.exp()).tolist(), q.tolist()
    low, high = max(values), max(values) + beta
    for _ in range(60):
        middle = (low + high) / 2
        total = sum(w / (middle - v) for w, v in zip(weights, values, strict=True))
        low, high = (middle, high) if total > 1 else (low, middle)
    return torch.log_softmax(log_ref - torch.log(high - q), -1)


def gae(world: World, rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """[X, Y, L]: A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V(s_{t+1}) - V(s_t), as the sum that it is.

    Args:
        rewards: [X, Y, L]
        values: [S]
    """
    here = world.per_state(values)
    after = torch.nn.functional.pad(here, (0, 1))[..., 1:]
    delta = rewards + gamma * after - here
    sums = [sum((gamma * lam) ** k * delta[..., t + k] for k in range(world.longest - t)) for t in range(world.longest)]
    return torch.where(world.token_mask, torch.stack(sums, -1), 0.0)


def score_function(world: World, log_p: Tensor, advantages: Tensor) -> Tensor:
    """-Σ_y π(y) Σ_t A_t log π(y_t | s_t), the mean over prompts, to be differentiated in log_p: its gradient is what a
    policy-gradient loss with these advantages has on average over all that could be sampled, per response.

    Args:
        advantages: [X, Y, L]; constants, as in the loss.
    """
    probability = response_logprobs(world, log_p).exp().detach()
    per_response = (advantages.detach() * world.per_token(log_p)).sum(-1)
    return -(probability * per_response).sum(-1).mean()


def visits(world: World, log_p: Tensor) -> Tensor:
    """[S]: how often a response passes through each state, on average over prompts."""
    probability = response_logprobs(world, log_p).exp() / len(world.prompts)
    counts = torch.zeros(world.over + 1, dtype=torch.float64)
    weights = probability.unsqueeze(-1).expand_as(world.path)
    return counts.index_add(0, world.path.flatten(), weights.flatten())[:-1]
