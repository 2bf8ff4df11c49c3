import logging
import re
import sys
from collections.abc import Iterator

import pytest

from rlhf.observe.logs import configure_logging


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_holds_time_level_service_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("policy-0")
    logging.getLogger("rlhf.policy").info("took %d", 3)
    (line,) = lines(capsys)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    policy-0 took 3", line)


def test_a_message_of_several_lines_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("reward")
    logging.getLogger("x").warning("first\nsecond\n")
    assert [line.split("reward ")[1] for line in lines(capsys)] == ["first ⏎ second"]


def test_configuring_again_replaces_the_name_and_writes_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("a")
    configure_logging("100%")
    logging.getLogger("x").error("now")
    (line,) = lines(capsys)
    assert line.endswith("ERROR   100% now")


def test_chatty_libraries_are_heard_from_warning_on(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("a")
    logging.getLogger("filelock").info("lock")
    logging.getLogger("filelock").warning("stuck")
    assert [line.split(" a ")[1] for line in lines(capsys)] == ["stuck"]


def test_stdout_stays_empty(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("a")
    logging.getLogger("x").info("now")
    sys.stdout.flush()
    assert capsys.readouterr().out == ""
