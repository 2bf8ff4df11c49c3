"""One rank's share of a vocabulary; processes that are spawned can import it from here."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from rlhf.ops import PpoTerms, fused_linear_logprobs, fused_linear_ppo_loss

TOKENS, WIDTH, VOCAB = 6, 8, 80


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=generator) for s in ((TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,)))
    # The shares' maxima lie so far apart that exp of their difference is infinite.
    hidden[0] *= 300
    labels = torch.randint(VOCAB - 17, (TOKENS,), generator=generator)
    labels[2] = -100
    return hidden, weight, bias, hidden + 0.1, weight * 1.1, labels


def outputs(rank: int, size: int, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Of this rank's share: outputs of both functions, and their gradients."""
    hidden, weight, bias, ref_hidden, ref_weight, labels = inputs()
    share = slice(rank * VOCAB // size, (rank + 1) * VOCAB // size)
    found: dict[str, torch.Tensor] = {}
    # 17 labels of padding: with four ranks the last holds nearly nothing but padding.
    options = {
        "ref_hidden_states": ref_hidden, "ref_lm_head_weight": ref_weight[share], "ref_lm_head_bias": bias[share],
        "temperature": 0.7, "valid_vocab_size": VOCAB - 17, "process_group": group,
    }  # fmt: skip
    for name in ("logprobs", "ppo"):
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight[share], bias[share]))
        if name == "logprobs":
            tokens = fused_linear_logprobs(h, w, labels, lm_head_bias=b, workspace_bytes=1, **options)
            (tokens.logprobs.sum() + tokens.kl.sum() + tokens.entropy.sum()).backward()
        else:
            old = torch.full((TOKENS,), -4.0)
            terms = PpoTerms(kl_coef=0.1, entropy_coef=0.01)
            loss, tokens, _ = fused_linear_ppo_loss(
                h, w, labels, old, torch.ones(TOKENS), lm_head_bias=b, terms=terms, **options
            )
            loss.backward()
            found["loss"] = loss.detach()
        found |= {f"{name}.{field}": value.detach() for field, value in tokens._asdict().items()}
        found |= {f"{name}.d_hidden": h.grad, f"{name}.d_weight": w.grad, f"{name}.d_bias": b.grad}
    return found


def work(rank: int, size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    torch.save(outputs(rank, size, dist.group.WORLD), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
