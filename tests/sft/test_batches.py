"""The order of rows over epochs."""

from rlhf.sft.batches import batches_per_epoch, shuffled_batches


def test_each_epoch_has_every_row_once_in_an_order_of_its_own():
    rows = [f"row {number}" for number in range(10)]
    batch = shuffled_batches(rows, 4, seed=3)
    assert batches_per_epoch(10, 4) == 3
    first, second = ([row for index in epoch for row in batch(index)] for epoch in (range(3), range(3, 6)))
    assert sorted(first) == sorted(second) == rows
    assert first != second
    assert [len(batch(index)) for index in range(3)] == [4, 4, 2]


def test_a_batch_depends_on_seed_and_index_alone():
    rows = list(range(50))
    one, same, other = (shuffled_batches(rows, 8, seed) for seed in (1, 1, 2))
    assert [one(index) for index in (0, 9, 3)] == [same(index) for index in (0, 9, 3)]
    assert one(0) != other(0)
