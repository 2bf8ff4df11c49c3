"""Policies and critics for enumerable worlds: tables with the interface of language models, and tiny transformers.

In a table every state has logits of its own, so a fixed point of the exact gradient is a policy that one can derive;
a transformer shares its parameters between states, as real policies do.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from oracle.world import World


class StateReader(nn.Module):
    """The trunk of a table: its hidden states are one-hot numbers of the state that the tokens lead to."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.root = torch.full((world.vocabulary,), world.over)
        self.root[list(world.prompts)] = torch.arange(len(world.prompts))
        self.next_state = world.next_state
        self.width = world.over + 1

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        states = [self.root[input_ids[:, 0]]]
        for t in range(1, input_ids.shape[1]):
            states.append(self.next_state[states[-1], input_ids[:, t]])
        one_hot = torch.nn.functional.one_hot(torch.stack(states, 1), self.width)
        return SimpleNamespace(last_hidden_state=one_hot.float())


class TablePolicy(nn.Module):
    """A table of logits as a causal language model: its output layer's weight is the table."""

    def __init__(self, world: World, log_p: Tensor, temperature: float = 1.0) -> None:
        super().__init__()
        self.base_model = StateReader(world)
        self.lm_head = nn.Linear(world.over + 1, world.vocabulary, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.nn.functional.pad(temperature * log_p, (0, 0, 0, 1)).T)
        text = SimpleNamespace(hidden_size=world.over + 1, max_position_embeddings=1 + world.longest)
        self.config = SimpleNamespace(get_text_config=lambda: text, name_or_path="a table")

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.base_model(input_ids).last_hidden_state))


class TableCritic(nn.Module):
    """A value for every state."""

    mean, std = 0.0, 1.0

    def __init__(self, world: World, values: Tensor | None = None) -> None:
        super().__init__()
        self.reader = StateReader(world)
        start = torch.zeros(world.over) if values is None else values.float()
        self.values = nn.Parameter(torch.nn.functional.pad(start, (0, 1)))

    def token_values(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.reader(input_ids).last_hidden_state @ self.values


def tiny_llama(world: World, *, seed: int = 0, hidden_size: int = 16, layers: int = 1) -> LlamaForCausalLM:
    """Its logits are spread wider than a fresh model's, so that responses differ in probability."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=world.vocabulary,
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=2,
                max_position_embeddings=8,
                initializer_range=0.3,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=0,
                pad_token_id=0,
            )
        )
    return model.eval()


def tiny_gpt2(world: World, *, seed: int = 0, hidden_size: int = 32) -> GPT2LMHeadModel:
    """With positions of its own. A Llama knows only distances, and a token repeated looks to it like the token once: it
    cannot answer 1 and 1 1 differently, which the optimum does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=world.vocabulary,
                n_embd=hidden_size,
                n_layer=1,
                n_head=2,
                n_positions=8,
                initializer_range=0.1,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=0,
                pad_token_id=0,
            )
        )
    return model.eval()


def state_ids(world: World) -> tuple[Tensor, Tensor]:
    """[S, L] token ids of every state, prompt first, padded with 0, and [S] their lengths."""
    ids = torch.zeros(world.over, world.longest, dtype=torch.int64)
    for s, (x, so_far) in enumerate(world.states):
        ids[s, : 1 + len(so_far)] = torch.tensor([world.prompts[x], *so_far])
    return ids, torch.tensor([1 + len(so_far) for _, so_far in world.states])


def log_table(model: nn.Module, world: World, temperature: float = 1.0) -> Tensor:
    """[S, V] float64: the log-probs of any model's policy; differentiable in its parameters."""
    ids, lengths = state_ids(world)
    logits = model(input_ids=ids, use_cache=False).logits[torch.arange(world.over), lengths - 1]
    return torch.log_softmax(logits.double() / temperature, -1)


@torch.no_grad()
def hidden_table(model: nn.Module, world: World) -> Tensor:
    """[S, H]: what the model's output layer reads in every state."""
    ids, lengths = state_ids(world)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator]
    return states[torch.arange(world.over), lengths - 1]
