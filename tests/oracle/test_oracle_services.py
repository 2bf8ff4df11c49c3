"""The optimum through everything a run consists of: real services, Redis, a worker, the trainer, each a process.

The policy is a tiny transformer over four tokens, one of them the padding: were it counted anywhere, it would show.
"""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oracle.models import log_table, tiny_gpt2
from oracle.world import World, kl, new_world, optimum, response_logprobs
from rlhf.models.causal import load_causal_lm, save_model
from rlhf.models.tokenizer import END_TOKEN, PAD_TOKEN
from support.runs import Run

WORLD = new_world(vocabulary=4, longest=3, prompts=(1, 2), spread=2.0)
VOCABULARY = (END_TOKEN, "one", "two", PAD_TOKEN)
TEMPERATURE, BETA = 0.8, 0.5


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=PAD_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN, pad_token=PAD_TOKEN)


def rule_of(world: World) -> str:
    """A reward rule that looks scores up in a table."""
    table = {
        (VOCABULARY[prompt], response): world.scores[x, y].item()
        for x, prompt in enumerate(world.prompts)
        for y, response in enumerate(world.responses)
    }
    lookup = "[TABLE[item.prompt, tuple(item.tokens)] for item in items]"
    return f"TABLE = {table!r}\n\ndef score(items):\n    return {lookup}\n"


def distance(model, log_goal) -> float:
    return kl(response_logprobs(WORLD, log_table(model, WORLD, TEMPERATURE)), log_goal).mean().item()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_of_services_and_queues_ends_at_the_optimum(tmp_path):
    run = Run(
        tmp_path,
        rule=rule_of(WORLD),
        sections={
            "sampling": {"max_new_tokens": WORLD.longest, "temperature": TEMPERATURE},
            "kl": {"coef": BETA},
            "critic": {"init_from": "policy", "lr": 0.01},
            "ppo": {
                "steps": 100,
                "batch_prompts": 128,
                "epochs": 4,
                "lr": 0.003,
                "lr_schedule": "linear",
                "whiten_advantages": False,
                "checkpoint_every": 40,
                "threads": 1,
            },
        },
    )
    start = tiny_gpt2(WORLD)
    save_model(start, word_tokenizer(), run.paths.pretrained)
    run.paths.prompts.write_text("".join(json.dumps({"prompt": VOCABULARY[p]}) + "\n" for p in WORLD.prompts))
    log_star = optimum(WORLD, log_table(start, WORLD, TEMPERATURE).detach(), BETA)
    assert distance(start, log_star) > 0.1
    running = run.start()
    try:
        output, _ = running.communicate(timeout=870)
    finally:
        running.kill()
    assert running.returncode == 0, output
    found = distance(load_causal_lm(run.paths.policy), log_star)
    print(f"KL to the optimum: {distance(start, log_star):.3f} nats before, {found:.4f} after")
    assert found < 0.02
