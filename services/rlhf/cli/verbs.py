"""Every verb of the `rlhf` command: where it lives, which settings are its options, and what decides its result.

Only names and text, so that `rlhf --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Verb:
    """`rlhf NAME`."""

    name: str
    module: str
    """Has `run(settings) -> figures or None`; imported after the arguments are parsed."""
    kind: Literal["stage", "service", "run", "look", "tool"]
    """`stage`: ends with figures, which are kept; `service`: runs until stopped; `run`: starts the others; `look`: only
    reads; `tool`: changes what it is told to, and keeps no record."""
    help: str
    section: str = ""
    """The section whose fields are options of this verb."""
    reads: tuple[str, ...] = ()
    """Other sections that matter to it, set with `--set`."""
    decided_by: tuple[str, ...] = ()
    """Beside `section`, the sections (`kl`) and fields (`reward.rule`) on which a stage's result depends: `rlhf run`
    repeats a stage when one of them has changed."""
    regardless_of: tuple[str, ...] = ()
    """Fields of `section` on which it does not depend: where a service is, where files in passing lie."""
    function: str = "run"
    """What `module` has in the place of `run`, where several verbs share it."""
    options: tuple[str, ...] = ()
    """Those fields of `section` that are options of this verb; empty: all of them."""
    asks_redis: bool = False
    """It asks the run's Redis, also after the run: an embedded one is started for as long as it takes."""


def _feedback(name: str, function: str, kind: Literal["look", "tool"], help: str, *options: str) -> Verb:
    options = ("snapshot", *options)
    return Verb(
        f"feedback {name}", "rlhf.feedback.commands", kind, help, "feedback", function=function, options=options
    )


_ROUNDS = (
    *(
        "rounds",
        "prompts",
        "candidates",
        "completions",
        "random_share",
        "active",
        "audit_pairs",
        "people",
        "deadline_s",
        "step_timeout_s",
    ),
    *("hold", "promote_margin", "threads", "nice", "seed"),
)
_AGGREGATION = ("reward.aggregation", "reward.variance_lambda", "reward.entropic_beta")
_KEYS = ("prompt_key", "chosen_key", "rejected_key", "tokenizer")
VERBS: tuple[Verb, ...] = (
    Verb("demo", "rlhf.supervisor.pipeline", "run", "all three steps in a small synthetic world", "run"),
    Verb("run", "rlhf.supervisor.pipeline", "run", "all stages of CONFIG under a local supervisor", "run"),
    Verb(
        "data",
        "rlhf.data.split",
        "stage",
        "split a folder of real texts into texts, prompts and labelled texts",
        "data",
    ),
    Verb("world", "rlhf.data.world", "stage", "write the demo's synthetic texts and prompts", "world"),
    Verb("pretrain", "rlhf.sft.pretrain", "stage", "step 1: train a language model on texts", "pretrain"),
    Verb("sft", "rlhf.sft.finetune", "stage", "step 1: fine-tune on demonstrations", "sft"),
    Verb(
        "sample",
        "rlhf.policy.sample",
        "stage",
        "step 2: sample K completions of each prompt",
        "sample",
        ("sampling",),
        ("sampling", "run.model"),
    ),
    Verb("rank", "rlhf.preference.rank", "stage", "step 2: simulated annotators rank completions", "rank"),
    Verb("annotate", "rlhf.annotate.server", "service", "step 2: a web page where people rank completions", "annotate"),
    _feedback(
        *("import", "import_", "tool", "step 2: judgments from other tools' files and data sets"),
        *("source", "format", "dataset", "on_bad", *_KEYS),
    ),
    _feedback("export", "export", "tool", "step 2: judgments to other tools' files", "out", "format", *_KEYS),
    _feedback("stats", "stats", "look", "step 2: who judged what, and how far they agree"),
    _feedback("withdraw", "withdraw_", "tool", "step 2: take an annotator's judgments out", "annotator", "retrain"),
    Verb(
        "reward-model",
        "rlhf.preference.train",
        "stage",
        "step 2: train a reward model on comparisons",
        "reward_model",
        decided_by=("run.model",),
    ),
    Verb("policy", "rlhf.policy.server", "service", "gRPC service: generate completions", "policy", ("redis",)),
    Verb("reward", "rlhf.reward.server", "service", "gRPC service: score completions", "reward"),
    Verb("reference", "rlhf.reference.server", "service", "gRPC service: the initial model's log-probs", "reference"),
    Verb(
        "rollouts",
        "rlhf.rollouts.worker",
        "service",
        "worker: prompts to policy, reward and reference to rollouts",
        "rollouts",
        ("redis", "sampling", "shaping"),
    ),
    Verb(
        "ppo",
        "rlhf.ppo.loop",
        "stage",
        "step 3: the trainer",
        "ppo",
        ("critic", "kl", "shaping", "monitor", "sampling", "redis"),
        (
            *("critic", "kl", "shaping", "sampling", "run.model", "policy.model", "policy.in_flight"),
            *("reward.model", "reward.rule", "reference.model", "run.deterministic", *_AGGREGATION),
            *(
                f"feedback.{name}"
                for name in _ROUNDS
                if name not in ("deadline_s", "step_timeout_s", "threads", "nice")
            ),
        ),
        regardless_of=("reference", "blobs"),
    ),
    Verb(
        "rounds",
        "rlhf.rounds.loop",
        "service",
        "steps 2 and 3: new judgments and a refreshed reward model while PPO runs",
        "feedback",
        ("redis", "rollouts", "rank", "reward_model"),
        options=_ROUNDS,
    ),
    Verb(
        "rounds resume",
        "rlhf.rounds.loop",
        "tool",
        "let PPO go on that an audit has paused",
        "feedback",
        ("redis",),
        function="resume",
        options=("rounds",),
        asks_redis=True,
    ),
    Verb("audit", "rlhf.ppo.audit", "look", "account for every rollout of a run", "ppo", ("redis",), asks_redis=True),
    Verb(
        "replay",
        "rlhf.ppo.replay",
        "look",
        "compute a step of a run again, or with other settings",
        "replay",
        ("kl", "ppo", "critic", "shaping"),
    ),
    Verb(
        "evaluate",
        "rlhf.evaluate.compare",
        "stage",
        "compare the policy before and after",
        "evaluate",
        ("sampling", "reward"),
        ("sampling", "run.model", "reward.model", *_AGGREGATION),
    ),
    Verb("report", "rlhf.evaluate.report", "stage", "HTML page with plots and samples", "evaluate"),
    Verb("status", "rlhf.observe.status", "look", "what a run is doing, and what waits for what", "run", ("redis",)),
    Verb(
        "doctor",
        "rlhf.doctor.checks",
        "look",
        "check that everything a run needs is in place",
        "run",
        ("redis", "rollouts", "policy", "reward", "reference"),
    ),
)
BY_NAME = {verb.name: verb for verb in VERBS}


def named_by(argv: Sequence[str]) -> str:
    """The verb's name at the head of a command line, of one word or two; empty where there is no such verb."""
    return next((name for words in (2, 1) if (name := " ".join(argv[:words])) in BY_NAME), "")
