import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf.errors import InputError, PortInUse, StageFailed, StorageError
from rlhf.supervisor import supervisor as module
from rlhf.supervisor.process import Process, ended_how, last_line
from rlhf.supervisor.settings import RunSettings
from rlhf.supervisor.signals import Signals
from rlhf.supervisor.supervisor import Supervisor, Watched

FOREVER = "import time; time.sleep(600)"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(module, "PROBE_EVERY_S", 0.01)
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.02)


@pytest.fixture
def signals() -> Iterator[Signals]:
    with Signals() as found:
        yield found


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., Process]:
    """A child process of the supervisor that runs some Python."""

    def make(name: str, code: str, ready: Callable[[], bool] = lambda: True) -> Process:
        return Process(name, [sys.executable, "-S", "-c", textwrap.dedent(code)], tmp_path / f"{name}.log", ready=ready)

    return make


def run_settings(**values: object) -> RunSettings:
    return RunSettings.model_validate({"stop_timeout_s": 5.0, "start_timeout_s": 20.0, **values})


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Ended, or ended and not reaped yet by whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


Make = Callable[..., Process]


def test_all_stop_when_the_one_that_matters_is_done(python: Make, signals: Signals) -> None:
    server = python("server", FOREVER)
    with Supervisor(run_settings(), signals) as supervisor:
        supervisor.start(server)
        supervisor.start(python("trainer", "print('trained')"))
        supervisor.run_until_done("trainer")
        assert server.exit_status() is None
    assert server.exit_status() == -signal.SIGTERM


def test_what_dies_is_started_again(
    python: Make, signals: Signals, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = python("server", f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); {FOREVER}")
    trainer = python(
        "trainer", f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)"
    )
    changes: list[str] = []

    def note(watched: list[Watched]) -> None:
        changes.extend(one.state for one in watched if one.child is server)

    starts = tmp_path / "starts"
    with caplog.at_level(logging.WARNING), Supervisor(run_settings(), signals, on_change=note) as supervisor:  # type: ignore[arg-type]
        supervisor.start(server)
        supervisor.start(trainer)
        supervisor.run_until_ready()
        wait_until(lambda: starts.exists() and starts.read_text() == "x")
        first = server.pid()
        assert first is not None
        os.kill(first, signal.SIGKILL)
        while starts.read_text() != "xx":
            supervisor._round()
        (tmp_path / "go").touch()
        supervisor.run_until_done("trainer")
        assert server.pid() != first
    assert [key for key, before in zip(changes, ["", *changes], strict=False) if key != before][:5] == [
        *("starting", "ready", "waiting", "starting", "ready")
    ]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == f"server died (killed by SIGKILL); restart 1 of 5 in 0.02 s; its log: {server.log}"


def test_pauses_double_and_then_it_gives_up_with_the_log_named(
    python: Make, signals: Signals, caplog: pytest.LogCaptureFixture
) -> None:
    server = python("server", "import sys; print('loading'); print('no such model', file=sys.stderr); sys.exit(7)")
    with (
        caplog.at_level(logging.WARNING),
        Supervisor(run_settings(max_restarts=3), signals) as supervisor,
    ):
        supervisor.start(python("trainer", FOREVER))
        supervisor.start(server)
        with pytest.raises(StageFailed) as failed:
            supervisor.run_until_done("trainer")
    pauses = [record.getMessage().split(" in ")[1].split(" s;")[0] for record in caplog.records]
    assert pauses == ["0.02", "0.04", "0.08"]
    assert str(failed.value) == (
        "server died 4 times within 120 s, now: exit code 7; it said last: no such model; its log: " + str(server.log)
    )


def test_deaths_long_ago_do_not_count(python: Make, signals: Signals, tmp_path: Path) -> None:
    counter = tmp_path / "starts"
    code = f"""
        import pathlib, sys, time
        path = pathlib.Path({str(counter)!r})
        path.write_text((path.read_text() if path.exists() else "") + "x")
        time.sleep(0.3)
        sys.exit(path.read_text() != "xxxx")
    """
    settings = run_settings(max_restarts=1, restart_window_s=0.25)
    with Supervisor(settings, signals) as supervisor:
        supervisor.start(python("trainer", code))
        supervisor.run_until_done("trainer")
    assert counter.read_text() == "xxxx"


@pytest.mark.parametrize("status", [InputError.exit_code, StageFailed.exit_code])
def test_what_cannot_help_is_not_tried_again(
    python: Make, signals: Signals, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    server = python("server", f"print('rlhf policy: no model'); raise SystemExit({status})")
    with Supervisor(run_settings(), signals) as supervisor:
        supervisor.start(server)
        supervisor.start(python("trainer", FOREVER))
        with pytest.raises(StageFailed, match=r"server failed .*; it said last: rlhf policy: no model; "):
            supervisor.run_until_done("trainer")
    assert not caplog.records


def test_a_full_disk_is_not_tried_again(python: Make, signals: Signals, caplog: pytest.LogCaptureFixture) -> None:
    trainer = python("trainer", f"print('rlhf ppo: no space'); raise SystemExit({StorageError.exit_code})")
    with Supervisor(run_settings(), signals) as supervisor:
        supervisor.start(trainer)
        with pytest.raises(StageFailed) as failed:
            supervisor.run_until_done("trainer")
    assert str(failed.value) == (
        "trainer failed (exit code 6: the disk is full, or a folder cannot be written); it said last: rlhf ppo: no "
        f"space; its log: {trainer.log}"
    )
    assert not caplog.records


def test_a_start_that_finds_the_disk_full_is_not_tried_again(
    python: Make, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = python("server", "raise SystemExit(1)")
    with Supervisor(run_settings(), signals) as supervisor:
        supervisor.start(server)

        def start() -> None:
            raise StorageError("the embedded Redis cannot use /full")

        monkeypatch.setattr(server, "start", start)
        supervisor.start(python("trainer", FOREVER))
        with pytest.raises(StorageError, match="cannot use /full"):
            supervisor.run_until_done("trainer")


def test_a_port_in_use_is_tried_again_since_its_holder_may_go(python: Make, signals: Signals) -> None:
    code = f"print('rlhf policy: port 7101 is in use'); raise SystemExit({PortInUse.exit_code})"
    with Supervisor(run_settings(max_restarts=1), signals) as supervisor:
        supervisor.start(python("policy-0", code))
        supervisor.start(python("trainer", FOREVER))
        with pytest.raises(StageFailed, match=r"died 2 times .*: exit code 3; it said last: .* port 7101 is in use; "):
            supervisor.run_until_done("trainer")


def test_a_server_that_ends_with_0_has_died_too(python: Make, signals: Signals) -> None:
    with Supervisor(run_settings(max_restarts=1), signals) as supervisor:
        supervisor.start(python("server", "pass"))
        supervisor.start(python("trainer", FOREVER))
        with pytest.raises(StageFailed, match="server died 2 times within 120 s, now: exit code 0"):
            supervisor.run_until_done("trainer")


def test_a_process_that_does_not_become_ready_has_failed(python: Make, signals: Signals) -> None:
    server = python("server", FOREVER, ready=lambda: False)
    settings = run_settings(start_timeout_s=0.2, max_restarts=1)
    with Supervisor(settings, signals) as supervisor:
        supervisor.start(server)
        with pytest.raises(StageFailed, match=r"server died 2 times .* now: not ready within 0\.2 s; its log: "):
            supervisor.run_until_ready()
        assert server.exit_status() == -signal.SIGKILL


def test_a_stubborn_process_and_its_children_are_killed(python: Make, signals: Signals, tmp_path: Path) -> None:
    code = f"""
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}} .")
        time.sleep(600)
    """
    pids = tmp_path / "pids"
    with Supervisor(run_settings(stop_timeout_s=0.3), signals) as supervisor:
        supervisor.start(python("server", code))
        wait_until(lambda: pids.exists() and pids.read_text().endswith("."))
        began_s = time.monotonic()
    assert 0.3 <= time.monotonic() - began_s < 3
    wait_until(lambda: all(gone(int(pid)) for pid in pids.read_text().split()[:2]), 5)


def test_what_a_dead_process_started_goes_with_it(
    python: Make, signals: Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "waitid", raising=False)  # macOS has it since Python 3.13
    pid = tmp_path / "pid"
    code = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        open({str(pid)!r}, "w").write(str(child.pid))
    """
    with Supervisor(run_settings(), signals) as supervisor:
        supervisor.start(python("trainer", code))
        supervisor.run_until_done("trainer")
        wait_until(lambda: gone(int(pid.read_text())), 5)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_stops_everything(
    number: signal.Signals, raised: type[BaseException], python: Make, signals: Signals
) -> None:
    server = python("server", FOREVER)
    with Supervisor(run_settings(), signals) as supervisor:
        supervisor.start(server)
        os.kill(os.getpid(), number)
        with pytest.raises(raised) as caught:
            supervisor.run_until_done("server")
    assert server.exit_status() == -signal.SIGTERM
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 143


def test_a_second_signal_does_not_wait_for_the_grace(python: Make, signals: Signals, tmp_path: Path) -> None:
    up = tmp_path / "up"
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(up)!r}, 'w'); time.sleep(600)"
    with Supervisor(run_settings(stop_timeout_s=60), signals) as supervisor:
        supervisor.start(python("server", code))
        wait_until(up.exists)
        # Not os.kill: another thread may receive both before the first is handled, and then they are one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 10


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_no_child_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    code = f"""
        import sys, time
        from pathlib import Path
        from rlhf.supervisor.process import Process
        folder = Path({str(tmp_path)!r})
        for name in ("policy", "trainer"):
            command = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
            process = Process(name, command, folder / f"{{name}}.log")
            process.start()
            print(process.pid(), flush=True)
        time.sleep(600)
    """
    supervisor = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    with supervisor.stdout:
        pids = [int(supervisor.stdout.readline()) for _ in range(2)]
        # The launcher has asked the kernel by the time it has become the other program.
        wait_until(lambda: all(b"launch.py" not in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids))
        assert not any(gone(pid) for pid in pids)
        supervisor.kill()
        supervisor.wait()
    wait_until(lambda: all(gone(pid) for pid in pids), 5)


def test_a_child_has_a_session_of_its_own_and_its_output_in_the_log(python: Make) -> None:
    process = python(
        "server", "import os, sys; print('out', os.getsid(0) == os.getpid()); print('err', file=sys.stderr)"
    )
    process.log.write_text("before\n")
    process.start()
    wait_until(lambda: process.exit_status() is not None)
    assert sorted(process.log.read_text().splitlines()) == ["before", "err", "out True"]


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert last_line(log) == ""
    log.write_bytes(b"first\nlast \xff one \n\n  \n")
    assert last_line(log) == "last � one"


def test_how_a_process_ended() -> None:
    assert [ended_how(status) for status in (3, -9, -64)] == ["exit code 3", "killed by SIGKILL", "killed by SIGRTMAX"]
