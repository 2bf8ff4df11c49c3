"""Fixed shapes: what a pass gets to see, and that an answer finds its way back."""

import pytest

from rlhf.errors import SettingsError
from rlhf.serving.fixed_shapes import LENGTH_STEP, ROWS, batches, check_alike, in_fixed_shapes, rounded_up


class Recorder:
    """A forward pass over strings, whose answer is the string."""

    def __init__(self):
        self.passes = []

    def __call__(self, items):
        self.passes.append([len(item) for item in items])
        return [item.upper() for item in items]


def fixed(recorder, longest=100):
    return in_fixed_shapes(recorder, length=len, filler=lambda tokens: "." * tokens, longest=longest)


def test_answers_come_in_the_order_of_the_items():
    items = ["a" * 5, "b" * 40, "c" * 6, *("d" * n for n in range(1, 30))]
    assert fixed(Recorder())(items) == [item.upper() for item in items]


@pytest.mark.parametrize("company", [[], ["x" * 9] * 3, ["x" * 16] * 20, ["x" * 90]])
def test_the_pass_of_an_item_has_the_same_shape_in_any_company(company):
    recorder = Recorder()
    fixed(recorder)(["a" * 9, *company])
    for lengths in recorder.passes:
        assert len(lengths) == ROWS
        assert max(lengths) in (LENGTH_STEP, 96)
        assert min(lengths) < max(lengths), "a batch of full rows would need no mask"
    assert max(recorder.passes[0]) == LENGTH_STEP


def test_no_items_need_no_pass():
    recorder = Recorder()
    assert fixed(recorder)([]) == []
    assert recorder.passes == []


@pytest.mark.parametrize(("tokens", "longest", "padded"), [(1, None, 16), (16, None, 16), (17, 24, 24), (24, 24, 24)])
def test_lengths_are_rounded_up_within_the_context(tokens, longest, padded):
    assert rounded_up(tokens, longest) == padded


def test_batches_hold_each_item_once():
    found = list(batches([3, 20, 4, 5, 33], None, 2))
    assert sorted(place for places, _ in found for place in places) == [0, 1, 2, 3, 4]
    assert ([0, 2], 16) in found
    assert ([3], 16) in found


def test_unequal_answers_to_equal_items_are_refused():
    check_alike([1.0, 1.0], "the policy")
    with pytest.raises(SettingsError, match=r"run\.deterministic: on this machine the policy rounds a sequence diff"):
        check_alike([1.0, 1.0 + 1e-16 + 3e-16], "the policy")
