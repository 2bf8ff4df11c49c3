"""Every Redis key of a run: its type, what it holds, and how long it lives.

All keys of a run share the hash tag `{rlhf:<run>}`, so they lie in one slot of a Redis Cluster, scripts may use several
of them, and two runs on one server never meet. `<prefix>` below is `{rlhf:<run>}:`.

    key                          type     holds                                              lives
    <prefix>q:<queue>            stream   entries; fields id, p (payload) and the caller's   until acknowledged or dead
    <prefix>q:<queue>:counts     hash     added, acknowledged, dead, lost (rise only);       with the run
                                          bytes, dead_bytes (payload bytes held now)
    <prefix>q:<queue>:sizes      hash     entry id -> payload bytes                          with the entry
    <prefix>q:<queue>:attempts   hash     entry id -> "<failures>:<nonce of the last>"       with the entry
    <prefix>q:<queue>:dead       stream   dead letters: the entry's fields, reason,          the newest
                                          attempts, entry                                    `redis.max_dead_letters`
    <prefix>q:<queue>:fence      string   number of the newest owner                         with the run
    <prefix>q:<queue>:seen:<id>  string   nonce of the call that enqueued this id            `redis.dedupe_s`
    <prefix>current              hash     run_id, epoch, step, sha256, uri of the weights    with the run
    <prefix>changed              channel  wakes who waits for `current`; carries nothing     not stored
    <prefix>paused               hash     who holds the trainer -> why                       until lifted
    <prefix>replicas             set      names that have registered                         name: until seen expired
    <prefix>replica:<name>       string   JSON of one policy replica                         `redis.lease_s`
    <prefix>beats                set      "<service>/<name>" that have reported              name: until seen expired
    <prefix>beat:<service>/<name> string  JSON of one process's report                       `redis.lease_s`

In every queue: added = acknowledged + dead + lost + entries in the stream.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QueueKeys:
    """Keys of one queue. The module's docstring says what lies under each."""

    name: str
    stream: str

    @property
    def counts(self) -> str:
        return f"{self.stream}:counts"

    @property
    def sizes(self) -> str:
        return f"{self.stream}:sizes"

    @property
    def attempts(self) -> str:
        return f"{self.stream}:attempts"

    @property
    def dead(self) -> str:
        return f"{self.stream}:dead"

    @property
    def fence(self) -> str:
        return f"{self.stream}:fence"

    def seen(self, item_id: str) -> str:
        return f"{self.stream}:seen:{item_id}"


@dataclass(frozen=True)
class RunKeys:
    """Keys of one run. `run` is `settings.run.name`, whose pattern keeps braces out."""

    run: str

    @property
    def prefix(self) -> str:
        return f"{{rlhf:{self.run}}}:"

    def queue(self, name: str) -> QueueKeys:
        return QueueKeys(name, f"{self.prefix}q:{name}")

    @property
    def prompts(self) -> QueueKeys:
        """PromptTask on the way to a rollout worker."""
        return self.queue("prompts")

    @property
    def rollouts(self) -> QueueKeys:
        """Rollout on the way to the trainer."""
        return self.queue("rollouts")

    @property
    def current(self) -> str:
        return f"{self.prefix}current"

    @property
    def changed(self) -> str:
        return f"{self.prefix}changed"

    @property
    def paused(self) -> str:
        return f"{self.prefix}paused"

    @property
    def replicas(self) -> str:
        return f"{self.prefix}replicas"

    @property
    def replica(self) -> str:
        """Prefix of the keys of single replicas."""
        return f"{self.prefix}replica:"

    @property
    def beats(self) -> str:
        return f"{self.prefix}beats"

    @property
    def beat(self) -> str:
        """Prefix of the keys of single reports."""
        return f"{self.prefix}beat:"
