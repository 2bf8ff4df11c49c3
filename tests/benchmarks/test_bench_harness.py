"""What every benchmark relies on: order of repetitions, percentiles, refused figures, and the tables."""

import asyncio
import math

import pytest

from harness import load as load_module
from harness.bench import Figure, expect_equal, expect_near, interleaved, percentile
from harness.load import Answer
from harness.model import MAX_NEW_TOKENS, asks
from table import headlines, number, write_into


def test_ways_take_turns():
    order = []
    found = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3
    assert found == {"a": [None] * 3, "b": [None] * 3}


@pytest.mark.parametrize(("share", "expected"), [(0.5, 5), (0.95, 10), (0.9, 9), (0.01, 1), (1.0, 10)])
def test_a_percentile_is_one_of_the_values(share, expected):
    assert percentile([10, 1, 9, 2, 8, 3, 7, 4, 6, 5], share) == expected


def test_a_figure_keeps_every_value():
    kept = Figure("speed", "tokens/s", [3.0, 1.0, 2.0], at_least=2).as_json()
    assert (kept["median"], kept["min"], kept["max"], kept["values"]) == (2.0, 1.0, 3.0, [3.0, 1.0, 2.0])


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_a_figure_without_numbers_is_refused(values):
    with pytest.raises(ValueError, match="numbers expected"):
        Figure("speed", "tokens/s", values).as_json()


def test_unequal_work_is_refused():
    expect_equal("tokens", service=5, transformers=5)
    with pytest.raises(ValueError, match="tokens differ"):
        expect_equal("tokens", service=5, transformers=4)


def test_work_that_rounding_alone_may_change_has_a_tolerance():
    expect_near("tokens", 1000, 990)
    with pytest.raises(ValueError, match="tokens differ"):
        expect_near("tokens", 1000, 970)


def test_lengths_are_geometric_and_cut():
    lengths = [ask.new_tokens for ask in asks(4000, vocab_size=4096)]
    assert min(lengths) == 1
    assert max(lengths) == MAX_NEW_TOKENS
    # Cut at 192, a geometric distribution of mean 48 has mean 48 · (1 - (47/48)^192) = 47.2.
    assert sum(lengths) / len(lengths) == pytest.approx(47.2, rel=0.05)


def test_latency_counts_from_the_intended_start(monkeypatch):
    """A client that is kept busy must not make the service look fast."""
    started = []

    async def nothing(*_):
        pass

    async def slow_to_start(stub, request, start_s, streamed):
        import time

        if not started:
            time.sleep(0.2)  # noqa: ASYNC251 - the client's loop stands still, as under load
        started.append(start_s)
        return Answer(1, time.perf_counter() - start_s, None)

    monkeypatch.setattr(load_module, "_all_connected", nothing)
    monkeypatch.setattr(load_module, "_ask", slow_to_start)

    async def measure():
        return await load_module._open_loop("127.0.0.1:1", asks(3, vocab_size=300), [0.0, 0.01, 0.02], 4)

    load = asyncio.run(measure())
    assert len(load.answers) == 3
    assert min(load.latencies_s) > 0.15


def result(median, **bounds):
    figure = Figure("speed", "×", [median], headline=True, **bounds).as_json()
    machine = {"cpu": "a CPU", "cores": 2, "memory_gib": 8, "os": "an OS", "python": "3.11", "versions": {"torch": "2"}}
    machine |= {"date": "2026-01-02 03:04 UTC", "commit": "abc"}
    return {"benchmark": "generation", "quick": False, "machine": machine, "figures": [figure]}


def test_a_missed_figure_says_so():
    assert "at least 2: **missed**" in headlines([result(1.9, at_least=2)])
    assert "missed" not in headlines([result(2.0, at_least=2)])
    assert "at most 5: **missed**" in headlines([result(5.1, at_most=5)])


def test_results_of_several_machines_are_told_apart():
    other = result(3.0)
    other["machine"]["cpu"] = "another CPU"
    table = headlines([result(3.0), other])
    assert "- generation: a CPU" in table
    assert "- generation: another CPU" in table


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12,300"), (123.4, "123"), (12.345, "12.3"), (2.0, "2.00"), (0.012345, "0.0123")]
)
def test_three_digits(value, text):
    assert number(value) == text


def test_the_table_replaces_what_is_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    write_into(page, "new\n")
    assert page.read_text() == "before\n<!-- bench: begin -->\nnew\n<!-- bench: end -->\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="has no"):
        write_into(page, "new\n")
