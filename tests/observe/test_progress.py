import io
import re

import pytest

from rlhf.observe import progress as module
from rlhf.observe.progress import figures_text, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_at_the_end_with_the_figures() -> None:
    out = io.StringIO()
    with progress("pretrain", total=300, unit="steps", stream=out) as bar:
        bar.advance(100, loss=3.0)
        bar.advance(200, loss=2.3149, lr=3e-4)
    assert out.getvalue() == "pretrain 300/300 steps 0 s  loss 2.31  lr 0.0003\n"


def test_a_log_gets_a_line_about_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with progress("sample", total=None, unit="prompts", stream=out) as bar:
        for _ in range(12):
            now[0] += 1.0
            bar.advance()
    assert out.getvalue().splitlines() == ["sample 5 prompts 5 s", "sample 10 prompts 10 s", "sample 12 prompts 12 s"]


def test_a_log_says_how_far_it_came_when_the_stage_fails() -> None:
    out = io.StringIO()

    def stage() -> None:
        with progress("sft", total=9, stream=out) as bar:
            bar.advance(2)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        stage()
    assert out.getvalue() == "sft 2/9 steps 0 s\n"


def test_a_terminal_gets_a_bar() -> None:
    out = Terminal()
    with progress("pretrain", total=3, unit="steps", stream=out) as bar:
        bar.advance(3, loss=2.5)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "3/3 steps" in plain
    assert "loss 2.5" in plain
    assert "━" in plain


def test_figures_keep_three_digits_and_whole_numbers() -> None:
    assert figures_text({"loss": 2.31499, "rollouts": 12345, "state": "warm-up"}) == (
        "loss 2.31  rollouts 12345  state warm-up"
    )
