from __future__ import annotations

import re
from pathlib import Path

from rlhf.queues import keys, scripts
from rlhf.queues.connection import open_client
from rlhf.queues.keys import RunKeys
from rlhf.queues.registry import Replica, open_registry
from rlhf.queues.settings import RedisSettings
from rlhf.queues.streams import rollouts_queue
from rlhf.wire.records import WeightVersion

RUN = RunKeys("demo")


def test_all_keys_of_a_run_lie_in_one_slot() -> None:
    queue = RUN.rollouts
    named = [queue.stream, queue.counts, queue.sizes, queue.attempts, queue.dead, queue.fence, queue.seen("demo/3/0")]
    named += [RUN.prompts.stream, RUN.current, RUN.changed, RUN.replicas, RUN.replica, RUN.beats, RUN.beat]
    assert all(key.startswith("{rlhf:demo}:") for key in named)
    assert len(set(named)) == len(named)


def test_every_key_that_is_written_is_documented_with_its_type(redis_settings: RedisSettings, run_name: str) -> None:
    documented = dict(re.findall(r"^    <prefix>(\S+) +(\w+) ", keys.__doc__ or "", flags=re.MULTILINE))
    with open_client(redis_settings.url, redis_settings) as client:
        queue = rollouts_queue(client, run_name, redis_settings)
        queue.take_over()
        for name in "abc":
            queue.enqueue(name, b"x")
        dead, failed, _ = queue.consume("t", 3, 0)
        queue.dead_letter(dead, "no")
        queue.fail(failed, "no")
        registry = open_registry(client, run_name, redis_settings)
        version = WeightVersion(run_name, 0, 1, "ab")
        registry.advance(version, "u", None)
        registry.register(Replica("p", "a:1", version, None, True))
        registry.beat("policy", "p", {})
        registry.pause("p", "a reason")
        prefix = RunKeys(run_name).prefix
        written = {key.decode().removeprefix(prefix): client.type(key).decode() for key in client.keys(f"{prefix}*")}
    assert {_general(key): kind for key, kind in written.items()} == {
        key: kind for key, kind in documented.items() if kind != "channel"
    }


def test_every_script_names_its_keys() -> None:
    texts = [text for name, text in vars(scripts).items() if name.isupper() and isinstance(text, str)]
    assert len(texts) == 8
    for text in texts:
        header = [line for line in text.strip().split("\n") if line.startswith("--")]
        used = {int(number) for number in re.findall(r"KEYS\[(\d)\]", text)}
        named = re.search(r"^-- KEYS +(.*)$", "\n".join(header), flags=re.MULTILINE)
        assert named is not None
        assert {int(number) for number in re.findall(r"(\d)  ?\S", named.group(1))} == used


def test_nothing_uses_maxlen() -> None:
    sources = Path(scripts.__file__).parent.glob("*.py")
    assert not [path.name for path in sources if re.search(r"maxlen", path.read_text(), flags=re.IGNORECASE)]


def _general(key: str) -> str:
    key = re.sub(r"^q:rollouts", "q:<queue>", key)
    key = re.sub(r":seen:.*", ":seen:<id>", key)
    return re.sub(r"^beat:.*", "beat:<service>/<name>", re.sub(r"^replica:.*", "replica:<name>", key))
