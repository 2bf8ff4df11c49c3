"""The PPO trainer: `rlhf ppo`.

    prompt source ──▶ prompts stream ──▶ workers and services ──▶ rollouts stream ──▶ intake
    (a thread)                                                                          │ next_batch
        ▲                                                                               ▼
        │ room                                                     step: advantages, minibatches, better weights
        └──────────────── ledger ◀── trained ◀── publish to every policy replica ◀──────┘
                            │
                            └──▶ checkpoint (durable) ──▶ acknowledge what it holds

Who blocks whom: the step blocks on the rollouts stream; the source blocks on the ledger's room and on a full prompts
stream; acknowledging waits for the checkpoint. Killed at any moment, the trainer goes on from its newest checkpoint in
a new epoch; whatever the streams bring meanwhile is judged by the ledger.
"""

from __future__ import annotations

import fcntl
import logging
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf.data.sampling import sampling_of
from rlhf.errors import DeadlineExceeded, StageFailed
from rlhf.models.causal import save_model
from rlhf.models.compute import set_deterministic, set_threads
from rlhf.models.folders import start_model
from rlhf.models.snapshots import remove_snapshots_after, save_snapshot
from rlhf.models.tokenizer import load_tokenizer, tokenizer_sha256
from rlhf.observe.progress import progress
from rlhf.ppo.checkpoint import checkpoint_versions, checkpoints, load_checkpoint, save_checkpoint
from rlhf.ppo.heartbeat import Heartbeat
from rlhf.ppo.history import History, trained_step
from rlhf.ppo.intake import Intake
from rlhf.ppo.invariants import Diagnosis
from rlhf.ppo.ledger import Ledger, Lineage
from rlhf.ppo.monitor import Monitor
from rlhf.ppo.probe import probe
from rlhf.ppo.prompts import encoded_prompts
from rlhf.ppo.publish import Publisher
from rlhf.ppo.records import RunRecords
from rlhf.ppo.setup import build_step, check_budget, check_critic_context, check_sampling, check_warmup
from rlhf.ppo.source import PromptSource, TaskMaker
from rlhf.queues.connection import connect
from rlhf.queues.registry import open_registry
from rlhf.queues.streams import prompts_queue, rollouts_queue
from rlhf.settings.run import Settings
from rlhf.wire.blobs import remove_blobs
from rlhf.wire.records import Rollout

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 30.0
ORPHAN_S = 600.0
"""A blob this old belongs to nobody once the streams are empty: a worker has at most its deadlines to use it."""
PAUSED_POLL_S = 0.5
STOPPED = 143
"""Exit status after SIGTERM: not finished, and ready to go on."""


def run(settings: Settings) -> dict[str, Any]:
    """Train until `ppo.steps`, from the newest checkpoint if there is one, and save the policy.

    Raises:
        StageFailed: another trainer has the run folder, or too many prompts failed.
        DeadlineExceeded: no rollouts came.
        and what loading, Redis and the disk raise.
    """
    set_threads(settings.ppo.threads)
    if settings.run.deterministic:
        set_deterministic()
    with _only_trainer(settings.paths.checkpoints):
        return Trainer(settings).run()


class Trainer:
    """The loop, and all that it holds together."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.paths = settings.paths
        check_sampling(settings.sampling)
        check_warmup(settings)
        self.tokenizer = load_tokenizer(settings.ppo.model or start_model(settings))
        self.ppo_step = build_step(settings, self.tokenizer)
        prompts = encoded_prompts(settings.ppo.prompts or self.paths.prompts, self.tokenizer, self._context - 1)
        check_budget(settings, prompts, self.ppo_step.learner.policy.config.get_text_config().hidden_size)
        check_critic_context(self.ppo_step, prompts, settings.sampling.max_new_tokens)

        client = connect(settings)
        self.registry = open_registry(client, settings.run.name, settings.redis)
        hash_of_tokenizer = tokenizer_sha256(self.tokenizer)
        self.publisher = Publisher(self.registry, self.paths.weights, hash_of_tokenizer, settings.ppo)
        self.ledger = self._open_ledger()
        self.monitor = Monitor(settings, self.ppo_step.learner, self.tokenizer, self.records.rows())
        self.probe_prompt = min(prompts, key=lambda prompt: len(prompt.token_ids))
        sampling, stopping = sampling_of(settings.sampling, settings.ppo.completions)
        maker = TaskMaker(
            prompts,
            run_id=self.ledger.lineage.run_id,
            seed=settings.ppo.seed,
            sampling=sampling,
            stopping=stopping,
            tokenizer_sha256=hash_of_tokenizer,
            ref_hidden_states=settings.kl.exact,
            seed_of_attempt=not settings.run.deterministic,
        )
        prompts_stream = prompts_queue(client, settings.run.name, settings.redis)
        self.source = PromptSource(self.ledger, prompts_stream, maker, lambda: self.publisher.version)
        rollouts_stream = rollouts_queue(client, settings.run.name, settings.redis)
        # A trainer that was paused, replaced and woken again must not acknowledge what its successor has not trained.
        rollouts_stream.take_over()
        self.intake = Intake(
            rollouts_stream,
            prompts_stream,
            self.ledger,
            consumer=settings.ppo.consumer,
            timeout_s=settings.ppo.rollout_timeout_s,
            keep_going=self._keep_going,
            hold=self._while_paused,
            blobs=settings.ppo.blobs or self.paths.blobs,
        )
        self.heartbeat = Heartbeat(self.registry, "ppo", settings.ppo.consumer, self._describe)
        self.doing = "starting"
        self._stop_requested = False

    def run(self) -> dict[str, Any]:
        with self._running(), progress("ppo", total=self.settings.ppo.steps, unit="steps") as bar:
            bar.advance(self.ledger.trained_steps)
            self._publish()
            self._wait_for_rounds()
            self.source.start()
            while self.ledger.trained_steps < self.settings.ppo.steps:
                figures = self._step()
                bar.advance(1, score=figures["score_mean"], kl=figures["kl_mean"], entropy=figures["entropy"])
            self.doing = "finishing"
            self.intake.drain(DRAIN_TIMEOUT_S)
            self._checkpoint()
            # Of answers that no rollout came of; the streams are empty, so nobody reads one any more.
            remove_blobs(self.settings.ppo.blobs or self.paths.blobs, keep=(), older_than_s=ORPHAN_S)
        return self._finish()

    def _step(self) -> dict[str, float]:
        """Wait for a batch, improve the policy with it, publish, write down, and now and then make it durable."""
        clock = _Clock()
        self.doing = "waiting for rollouts"
        batch = self.intake.next_batch(self.settings.ppo.batch_prompts)
        clock.lap("seconds_wait")
        self.doing = "training"
        staleness = [self.ledger.staleness(rollout) for rollout in batch]
        self.ppo_step.learner.begin_step(self.ledger.trained_steps)
        improved = self.ppo_step(batch, self.monitor.look)
        clock.lap("seconds_train")
        self.ledger.train(batch)
        self.intake.trained(batch)
        before = self.publisher.version.sha256
        self._publish()
        clock.lap("seconds_publish")

        known = {name: value for name, value in asdict(improved).items() if value is not None}
        figures = {**known, **_of_staleness(staleness, self.settings.ppo.max_staleness), **clock.laps}
        figures, diagnoses = self.monitor.judge(self.ledger.trained_steps, figures)
        self._record(figures, batch, diagnoses)
        self.monitor.act(figures, diagnoses)
        self._keep_rollouts(before, batch)
        self._snapshot()
        if self._checkpoint_due():
            self._checkpoint()
        return figures

    def _publish(self) -> None:
        self.doing = "publishing weights"
        lineage = self.ledger.lineage
        policy = self.ppo_step.learner.policy
        version = self.publisher.publish(policy, lineage.run_id, lineage.epoch, self.ledger.trained_steps)
        # While the policies have nothing else to do.
        self.monitor.published(version, self.publisher.held, self._probe)
        # Only now may prompts go out that ask for these weights.
        self.ledger.publish(self.ledger.trained_steps)

    def _probe(self) -> dict[str, Rollout]:
        return probe(
            self.publisher.channels(),
            self.probe_prompt,
            self.publisher.version,
            temperature=self.settings.sampling.temperature,
            tokenizer_sha256=self.publisher.tokenizer_sha256,
            timeout_s=self.settings.ppo.publish_timeout_s,
        )

    def _record(self, figures: dict[str, float], batch: list[Rollout], diagnoses: list[Diagnosis]) -> None:
        step = self.ledger.trained_steps
        self.records.step(self.ledger.lineage.epoch, step, figures, batch, diagnoses)
        if step % self.settings.ppo.sample_every == 0 or step == self.settings.ppo.steps:
            self.records.samples(step, batch)

    def _snapshot(self) -> None:
        ppo, step = self.settings.ppo, self.ledger.trained_steps
        if ppo.snapshot_every and step % ppo.snapshot_every == 0:
            policy = self.ppo_step.learner.policy
            save_snapshot(self.paths.snapshots, step, policy, self.tokenizer, ppo.keep_snapshots)

    def _keep_rollouts(self, weights_before: str, batch: list[Rollout]) -> None:
        """For `rlhf replay`."""
        if self.settings.ppo.keep_rollouts_mib:
            weights = weights_before, self.publisher.version.sha256
            epoch, step = self.ledger.lineage.epoch, self.ledger.trained_steps
            self.history.keep(trained_step(self.settings, step, epoch, weights, batch))

    def _checkpoint_due(self) -> bool:
        steps, ppo, redis = self.ledger.trained_steps, self.settings.ppo, self.settings.redis
        # Half the stream's bounds: the other half must take what the workers make meanwhile.
        crowded = (
            self.intake.unacknowledged_bytes > redis.max_mib * 2**20 // 2
            or self.intake.unacknowledged_entries > redis.max_entries // 2
        )
        return steps % ppo.checkpoint_every == 0 or crowded

    def _checkpoint(self) -> None:
        self.doing = "saving a checkpoint"
        save_checkpoint(self.paths.checkpoints, self.ppo_step, self.ledger, self.settings.ppo.keep_checkpoints)
        self.intake.acknowledge()
        self.publisher.remove_old(checkpoint_versions(self.paths.checkpoints))

    def _finish(self) -> dict[str, Any]:
        out = self.settings.ppo.out or self.paths.policy
        save_model(self.ppo_step.learner.policy, self.tokenizer, out)
        return {
            "policy": str(out),
            "steps": self.ledger.trained_steps,
            "rollouts": self.ledger.trained_prompts,
            "stale": len(self.ledger.stale),
            "dead": len(self.ledger.dead),
            "kl_coef": self.ppo_step.kl.coef,
        }

    def _open_ledger(self) -> Ledger:
        """The newest checkpoint's, in a new epoch; or that of a new run, durable before anything is issued."""
        ppo = self.settings.ppo
        ledger = Ledger(
            Lineage(f"{self.settings.run.name}-{secrets.token_hex(4)}", {}, self._next_epoch()),
            batch=ppo.batch_prompts,
            max_steps=ppo.steps,
            max_staleness=ppo.max_staleness,
            max_failures=ppo.max_prompt_attempts,
        )
        saved = checkpoints(self.paths.checkpoints)
        if saved:
            state = load_checkpoint(saved[-1], self.ppo_step)
            ledger.restore(state, max(self._next_epoch(), state["epoch"] + 1))
            log.info("going on from step %d in epoch %d", ledger.trained_steps, ledger.lineage.epoch)
        self.records = RunRecords(self.paths, ledger.trained_steps)
        self.history = History(self.paths.history, ppo.keep_rollouts_mib * 2**20)
        self.history.undo_after(ledger.trained_steps)
        remove_snapshots_after(self.paths.snapshots, ledger.trained_steps)
        if not saved:
            save_checkpoint(self.paths.checkpoints, self.ppo_step, ledger, ppo.keep_checkpoints)
        return ledger

    def _next_epoch(self) -> int:
        """Above every epoch that weights were ever published in, so that no version is used twice."""
        current = self.registry.current()
        return max(self.publisher.newest_epoch(), current.version.epoch if current else -1) + 1

    def _keep_going(self) -> None:
        if self.source.error is not None:
            raise self.source.error
        if self._stop_requested:
            if self.intake.unacknowledged_entries:
                self._checkpoint()
            raise SystemExit(STOPPED)

    def _wait_for_rounds(self) -> None:
        """Where there are rounds of feedback to come, until `rlhf rounds` says that it follows.

        Raises:
            DeadlineExceeded: nobody does.
        """
        if not self.settings.feedback.rounds or self.paths.rounds_finished.exists():
            return
        self.doing = "waiting for the rounds of feedback to begin"
        deadline = time.monotonic() + self.settings.ppo.rollout_timeout_s
        while not any(beat.service == "rounds" and beat.fields["ready"] for beat in self.registry.beats()):
            self._keep_going()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"feedback.rounds is {self.settings.feedback.rounds}, but no `rlhf rounds` has reported for "
                    f"{self.settings.ppo.rollout_timeout_s:.0f} s; start it, or set feedback.rounds to 0"
                )
            time.sleep(PAUSED_POLL_S)

    def _while_paused(self) -> None:
        """Until whoever holds the trainer lets it go on; a person can, by `rlhf rounds resume`."""
        while reasons := self.registry.paused():
            reason = "; ".join(reasons.values())
            if self.doing != f"paused: {reason}":
                self.doing = f"paused: {reason}"
                log.warning("paused: %s", reason)
            self._keep_going()
            time.sleep(PAUSED_POLL_S)
        self.doing = "waiting for rollouts"

    def _describe(self) -> dict[str, Any]:
        return {
            "doing": self.doing,
            "step": self.ledger.trained_steps,
            "steps": self.settings.ppo.steps,
            "epoch": self.ledger.lineage.epoch,
            "rollouts_ready": self.intake.waiting,
            "rollouts_needed": self.settings.ppo.batch_prompts,
            "prompts_out": len(self.ledger.outstanding),
            "stale": len(self.ledger.stale),
            "dead": len(self.ledger.dead),
            "kl_coef": self.ppo_step.kl.coef,
        }

    @property
    def _context(self) -> int:
        config = self.ppo_step.learner.policy.config.get_text_config()
        return int(config.max_position_embeddings)

    @contextmanager
    def _running(self) -> Iterator[None]:
        def stop(_signal: int, _frame: FrameType | None) -> None:
            self._stop_requested = True

        before = signal.signal(signal.SIGTERM, stop)
        self.heartbeat.start()
        try:
            yield
        finally:
            self.source.stop()
            self.heartbeat.stop()
            self.records.close()
            signal.signal(signal.SIGTERM, before)


def _of_staleness(staleness: list[int], limit: int) -> dict[str, float]:
    """Mean and histogram: how many of a step's rollouts came from weights that many steps old."""
    histogram = {f"staleness_{steps}": float(staleness.count(steps)) for steps in range(limit + 1)}
    return {"staleness_mean": sum(staleness) / len(staleness), **histogram}


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._last
        self._last = now


@contextmanager
def _only_trainer(folder: Path) -> Iterator[None]:
    """Two trainers on one folder would overwrite each other's checkpoints. The lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StageFailed(f"another trainer is at work in {folder.parent}; stop it first") from error
        yield
