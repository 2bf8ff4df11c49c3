"""`rlhf rounds`: feedback while PPO runs, one round after the other.

    PPO   ●───────── step ──▶──────────────────────●──────────────────────────────●  finished
          │ round 0                                │ round 1                       │ last round
          └ the initial policy on the audit's      └ newest policy ─▶ judges ─▶    └ the finished policy against that
            prompts                                  reward model ─▶ reward          of the round before
                                                     service; audit

PPO does not wait for a round unless `feedback.hold` says so, and goes first on the CPU.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from rlhf.annotate.store import open_store
from rlhf.data.prompts import read_prompts
from rlhf.errors import RlhfError, SettingsError, StageFailed
from rlhf.models.compute import set_threads
from rlhf.models.folders import start_model, write_json
from rlhf.models.tokenizer import load_tokenizer
from rlhf.ppo.heartbeat import Heartbeat
from rlhf.queues.connection import connect
from rlhf.queues.registry import open_registry
from rlhf.rounds.judges import Judges, People, SimulatedJudges
from rlhf.rounds.plan import Planned, plan
from rlhf.rounds.refresh import first_model
from rlhf.rounds.round import Round, Tools
from rlhf.rounds.sampling import Sampler
from rlhf.serving.client import call_sync, connect_sync
from rlhf.settings.run import Settings
from rlhf.v1 import reward_pb2, reward_pb2_grpc

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0


def run(settings: Settings) -> None:
    """Goes through all rounds, from where an earlier process was.

    Raises:
        SettingsError, ModelError: there are no rounds to make, or no reward model to refresh.
        StageFailed: there is no trainer to wait for, or it makes no step.
        RlhfError: what a round raises.
    """
    if not settings.feedback.rounds:
        raise SettingsError("feedback.rounds is 0, so there is nothing to do; set it to the number of rounds")
    first_model(settings)
    os.nice(settings.feedback.nice)
    set_threads(settings.feedback.threads)
    Loop(settings).run()


def resume(settings: Settings) -> None:
    """Lets PPO go on that an audit has paused."""
    registry = open_registry(connect(settings), settings.run.name, settings.redis)
    lifted = [reason for holder, reason in registry.paused().items() if registry.resume(holder)]
    print("\n".join(f"lifted: {reason}" for reason in lifted) or f"nothing holds run {settings.run.name}")


class Loop:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._doing, self._ready = "starting", False
        self._registry = open_registry(connect(settings), settings.run.name, settings.redis)
        self._heartbeat = Heartbeat(self._registry, "rounds", "rounds", self._describe)

    def run(self) -> None:
        settings = self._settings
        tokenizer = load_tokenizer(settings.ppo.model or start_model(settings))
        prompts = read_prompts(settings.ppo.prompts or settings.paths.prompts)
        self._heartbeat.start()
        try:
            tools = Tools(
                settings, Sampler(settings, tokenizer), self._judges(), self._registry, self._in_service, self._tell
            )
            for planned in plan(prompts, settings.feedback, settings.ppo.steps):
                # PPO makes no step before there is somebody to hold it, and something to compare it with.
                self._ready = planned.number > 0
                if not (one := Round(tools, planned)).done:
                    self._wait_for(planned)
                    one.run()
            write_json(settings.paths.rounds_finished, {"rounds": settings.feedback.rounds})
        finally:
            self._heartbeat.stop()

    def _judges(self) -> Judges:
        if self._settings.feedback.people:
            return People(open_store(self._settings), self._settings.feedback.deadline_s)
        return SimulatedJudges.of(self._settings)

    def _wait_for(self, planned: Planned) -> None:
        """Until PPO has published the round's step.

        Raises:
            StageFailed: no trainer has reported for `run.start_timeout_s`, or none has published anything for
                `feedback.step_timeout_s`, though nobody holds it.
        """
        self._tell(f"round {planned.number} begins at step {planned.step}")
        current = self._registry.current()
        seen_s = moved_s = time.monotonic()
        while current is None or current.version.step < planned.step:
            now_s, before = time.monotonic(), current
            if any(beat.service == "ppo" for beat in self._registry.beats()):
                seen_s = now_s
            if self._registry.paused():
                moved_s = now_s
            self._refuse_to_wait(planned, now_s - seen_s, now_s - moved_s)
            current = self._registry.wait_for_change(LOOK_EVERY_S, before)
            if current != before:
                moved_s = time.monotonic()

    def _refuse_to_wait(self, planned: Planned, unseen_s: float, unmoved_s: float) -> None:
        gone_s, stuck_s = self._settings.run.start_timeout_s, self._settings.feedback.step_timeout_s
        waits = f"round {planned.number} waits for step {planned.step} of PPO, and"
        see = self._settings.paths.logs / "ppo.log"
        if unseen_s > gone_s:
            raise StageFailed(
                f"{waits} no trainer has reported for {gone_s:g} s; start it (`rlhf run` does), or see {see}"
            )
        if unmoved_s > stuck_s:
            raise StageFailed(
                f"{waits} the trainer has published nothing for {stuck_s:g} s; see {see}, or raise "
                "feedback.step_timeout_s if a step takes that long"
            )

    def _in_service(self) -> str:
        its = self._settings.rollouts
        with connect_sync(its.reward, token_file=its.token_file, tls_ca=its.tls_ca) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            try:
                return str(call_sync(stub.Info, reward_pb2.RewardInfoRequest(), timeout_s=5.0).model_sha256)
            except RlhfError as error:
                if not error.retryable:
                    raise
                log.info("the reward service is asked again: %s", error)
                return ""

    def _describe(self) -> dict[str, Any]:
        return {"doing": self._doing, "ready": self._ready}

    def _tell(self, doing: str) -> None:
        if doing != self._doing:
            log.info(doing)
        self._doing = doing
