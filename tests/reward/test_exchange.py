"""The reward service follows a pointer to the model that it serves, between two calls and through restarts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ModelError
from rlhf.models.ensemble import reward_sha256
from rlhf.models.folders import write_json
from rlhf.reward.exchange import InService, Loaded, Pointer, read_pointer, write_pointer
from rlhf.reward.scores import About
from rlhf.reward.server import SERVICE, starting
from rlhf.reward.settings import RewardSettings
from rlhf.serving.client import call, connect
from rlhf.serving.server import running
from rlhf.serving.worker_thread import WorkerThread
from rlhf.settings.run import Settings
from rlhf.v1 import reward_pb2, reward_pb2_grpc
from rlhf.wire.tensors import from_tensor
from support.tiny import tiny_adapted_folder, tiny_reward_folder

ITEMS = [reward_pb2.TextItem(prompt="A fine film", completion=f" number {n}") for n in range(4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An ordinary one, and an ensemble of adapters."""
    parent = tmp_path_factory.mktemp("models")
    return [tiny_reward_folder(parent / "model-0"), tiny_adapted_folder(parent / "model-1")]


def pointed_at(path: Path, folder: Path, sha256: str = "") -> str:
    sha256 = sha256 or reward_sha256(folder)
    write_pointer(path, Pointer(str(folder), sha256, 1))
    return sha256


def settings_of(model: Path, follow: Path) -> Settings:
    return Settings(reward=RewardSettings(model=model, follow=follow, follow_poll_s=0.05, threads=1))


async def score(stub: Any) -> tuple[str, list[float]]:
    request = reward_pb2.ScoreRequest(texts=reward_pb2.TextBatch(items=ITEMS))
    response = await call(stub.Score, request, timeout_s=20)
    return response.model_sha256, from_tensor(response.scores, "scores", dtypes="f").tolist()


def serve(settings: Settings, use: Any) -> None:
    async def main() -> None:
        async with (
            running("reward", settings.reward, [SERVICE], starting(settings)) as server,
            connect(server.address, service=SERVICE) as channel,
        ):
            await use(reward_pb2_grpc.RewardServiceStub(channel))

    asyncio.run(main())


def test_it_changes_over_while_calls_come_in_and_each_call_is_of_one_model(folders: list[Path], tmp_path: Path) -> None:
    path, first, second = tmp_path / "pointer.json", *map(reward_sha256, folders)

    async def use(stub: Any) -> None:
        answers: list[tuple[str, list[float]]] = []

        async def ask_on() -> None:
            while not any(sha256 == second for sha256, _ in answers[-3:]):
                answers.append(await score(stub))

        callers = [asyncio.create_task(ask_on()) for _ in range(4)]
        await asyncio.sleep(0.3)
        assert {sha256 for sha256, _ in answers} == {first}
        pointed_at(path, folders[1])
        await asyncio.wait_for(asyncio.gather(*callers), 30)
        by_model = {sha256: {tuple(scores) for of, scores in answers if of == sha256} for sha256 in (first, second)}
        assert {sha256 for sha256, _ in answers} == {first, second}
        # One set of scores under each name: no call was scored by both.
        rounded = {name: {tuple(round(s, 4) for s in scores) for scores in found} for name, found in by_model.items()}
        assert [len(found) for found in rounded.values()] == [1, 1]
        assert rounded[first] != rounded[second]
        info = await call(stub.Info, reward_pb2.RewardInfoRequest(), timeout_s=5)
        assert info.model_sha256 == second

    serve(settings_of(folders[0], path), use)


def test_a_restarted_service_begins_with_what_the_pointer_names(folders: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "pointer.json"
    expected = pointed_at(path, folders[1])

    async def use(stub: Any) -> None:
        assert (await score(stub))[0] == expected

    serve(settings_of(folders[0], path), use)


@pytest.mark.parametrize("wrong", ["no model", "another model"])
def test_what_cannot_be_served_leaves_the_model_in_service(
    folders: list[Path], tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, first = tmp_path / "pointer.json", reward_sha256(folders[0])

    async def use(stub: Any) -> None:
        if wrong == "no model":
            pointed_at(path, tmp_path / "nothing", "0" * 64)
        else:
            pointed_at(path, folders[1], "0" * 64)
        for _ in range(400):
            if "stays in service" in caplog.text:
                break
            await asyncio.sleep(0.05)
        assert "stays in service" in caplog.text
        assert (await score(stub))[0] == first
        expected = pointed_at(path, folders[1])
        found = first
        for _ in range(400):
            if (found := (await score(stub))[0]) == expected:
                break
            await asyncio.sleep(0.05)
        assert found == expected

    serve(settings_of(folders[0], path), use)


def test_the_old_model_goes_after_its_last_call() -> None:
    """One call holds the old model while the new one is put in its place."""

    async def main() -> None:
        old, new = SlowScorer("old"), SlowScorer("new")
        service = InService(Loaded(old, WorkerThread("old")), lambda error: None)  # type: ignore[arg-type]
        await service.begin()
        first = asyncio.create_task(service.score(None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        exchange = asyncio.create_task(service.exchange(Loaded(new, WorkerThread("new"))))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        second = asyncio.create_task(service.score(None))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        assert not exchange.done()
        assert not old.batcher.ended
        new.go.set()
        assert (await second)[1].model_sha256 == "new"
        old.go.set()
        assert (await first)[1].model_sha256 == "old"
        await asyncio.wait_for(exchange, 5)
        assert old.batcher.ended
        assert not new.batcher.ended
        await service.end()

    asyncio.run(main())


class SlowScorer:
    def __init__(self, name: str) -> None:
        self.about = About("model", name, "", 0.0, 1.0)
        self.batcher = FakeBatcher()
        self.go = asyncio.Event()

    async def score(self, call: object) -> list[object]:
        await self.go.wait()
        return []


class FakeBatcher:
    ended = False

    def running(self, on_failure: object) -> Any:
        return self

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        self.ended = True


def test_a_pointer_that_says_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pointer.json"
    assert read_pointer(path) is None
    write_json(path, {"folder": "somewhere"})
    with pytest.raises(ModelError, match=r"pointer\.json"):
        read_pointer(path)
