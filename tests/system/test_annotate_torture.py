"""SIGKILL, again and again, of web servers and annotators at work: what was acknowledged is there, and there once."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from rlhf.annotate.store import Store
from rlhf.annotate.tables import Assignment, JudgmentRow, TaskRow
from support.annotating import add_person, session_of, sqlite, task
from support.annotation_server import AnnotationServer, is_open

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

TASKS, NEED = 2500, 2
PEOPLE, AT_WORK = 48, 6
LEASE_S = 1.5
CLIENT = Path(__file__).parent.parent / "support" / "annotation_torture.py"


class Torture:
    """Two servers on one database, six people at a time; whoever is killed is replaced by somebody else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.random = random.Random(7)
        self.store = Store(sqlite(folder))
        self.store.add_tasks([task(number, need=NEED) for number in range(TASKS)])
        now = time.time()
        for number in range(PEOPLE):
            add_person(self.store, f"p{number}", now=now)
        self.sessions = [session_of(self.store, f"p{number}", now) for number in range(PEOPLE)]
        self.free = list(range(PEOPLE))
        self.servers: list[AnnotationServer] = []
        self.people: dict[int, subprocess.Popen[bytes]] = {}
        self.kills: Counter[str] = Counter()

    def begin(self) -> None:
        for _ in range(2):
            self.start_server()
        for _ in range(AT_WORK):
            self.start_person()

    def start_server(self) -> None:
        settings = {"database": sqlite(self.folder), "lease_s": LEASE_S, "repeat_share": 0.02, "gold_share": 0}
        server = AnnotationServer(self.folder, **settings, submits_per_minute=10**6)
        server.start()
        self.servers.append(server)

    def start_person(self) -> None:
        who = self.free.pop(0)
        job = {
            "ports": [server.port for server in self.servers],
            "session": self.sessions[who], "seed": self.random.random(), "lease_s": LEASE_S,
            "dawdles": 0.01, "stop": str(self.folder / "stop"), "log": str(self.folder / f"acknowledged-{who}.jsonl"),
        }  # fmt: skip
        path = self.folder / f"job-{who}.json"
        path.write_text(json.dumps(job))
        with (self.folder / f"person-{who}.log").open("ab") as log:
            self.people[who] = subprocess.Popen([sys.executable, "-S", str(CLIENT), str(path)], stdout=log, stderr=log)

    def kill_a_server(self) -> None:
        server = self.random.choice(self.servers)
        server.kill()
        self.kills["server"] += 1
        server.start()

    def both_servers_answer(self) -> bool:
        """Killed are servers that work, in the middle of it."""
        return all(is_open(server.port) for server in self.servers)

    def kill_a_person(self) -> None:
        """They return later, as people do: whatever they held goes to others first."""
        who = self.random.choice(list(self.people))
        process = self.people.pop(who)
        assert process.poll() is None, (self.folder / f"person-{who}.log").read_text()
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        self.kills["person"] += 1
        self.free.append(who)
        self.start_person()

    def end(self) -> None:
        (self.folder / "stop").touch()
        for process in self.people.values():
            assert process.wait(30) == 0
        assert [server.stop() for server in self.servers] == [0, 0]

    def remove(self) -> None:
        for process in [*(server.process for server in self.servers), *self.people.values()]:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(10)
        self.store.close()

    def acknowledged(self) -> list[dict[str, Any]]:
        """A killed person's last line may be cut off: it was killed while it wrote, so it never knew."""
        logs = [path.read_text().split("\n") for path in self.folder.glob("acknowledged-*.jsonl")]
        return [json.loads(line) for lines in logs for line in lines if line.endswith("}}")]


@pytest.fixture
def torture() -> Iterator[Torture]:
    # In memory where there is such a place: a process that is killed loses nothing that it gave to the kernel, so the
    # disk has no part in this test.
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    it = Torture(folder)
    yield it
    it.remove()
    shutil.rmtree(folder)


def test_no_acknowledged_answer_is_lost_or_doubled(torture: Torture) -> None:
    began_s = time.monotonic()
    torture.begin()
    remaining, server_at, person_at = TASKS * NEED, 4900, 4950
    while remaining and time.monotonic() - began_s < 600:
        time.sleep(0.1)
        remaining = torture.store.counts().remaining
        # By work done rather than by time, so that a slow machine sees as many kills.
        if remaining < server_at and torture.both_servers_answer():
            torture.kill_a_server()
            server_at = remaining - torture.random.randint(200, 400)
        if remaining < person_at:
            torture.kill_a_person()
            person_at = remaining - torture.random.randint(30, 90)
    torture.end()
    check(torture, time.monotonic() - began_s)


def check(torture: Torture, seconds: float) -> None:
    acknowledged = torture.acknowledged()
    with torture.store.database.reading() as session:
        rows = {row.id: row for row in session.scalars(select(JudgmentRow))}
        lost = [one for one in acknowledged if not is_saved(one, rows.get(one["saved"]))]
        in_time = [row for row in rows.values() if not row.late]
        asked = [row.assignment for row in in_time if row.assignment.task.source == "random"]
        grants = {(row.assignment.task_seq, row.fence) for row in rows.values()}
        pairs = {(row.assignment.task_seq, row.account_id) for row in rows.values()}
        taken_over = session.scalars(select(func.count()).where(TaskRow.fence > TaskRow.need)).one()
        slots = session.scalars(select(func.count()).where(Assignment.slot.is_not(None))).one()
    print(
        f"\n{len(rows)} judgments ({len(rows) - len(in_time)} late), {len(acknowledged)} acknowledgements, "
        f"{dict(torture.kills)} killed, {taken_over} tasks taken over, {seconds:.0f} s"
    )
    assert lost == []
    assert len(grants) == len(pairs) == len(rows), "a judgment was doubled, or two people held one unit"
    assert Counter(each.task_seq for each in asked) == {each.task_seq: NEED for each in asked}
    assert len(asked) == TASKS * NEED
    assert slots == len(in_time)
    assert len({one["saved"] for one in acknowledged}) >= len(rows) - sum(torture.kills.values())
    assert torture.kills["server"] >= 10
    assert torture.kills["person"] >= 20
    assert taken_over >= 10
    assert len(rows) > len(in_time), "nobody was late: the fence was not tried"


def is_saved(one: dict[str, Any], row: JudgmentRow | None) -> bool:
    if row is None or row.key != one["key"]:
        return False
    by_place = [row.ranks[index] for index in row.assignment.order_shown]
    return by_place == [sorted(set(one["ranks"])).index(rank) + 1 for rank in one["ranks"]]
