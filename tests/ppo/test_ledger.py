"""Admission, verdicts and outcomes."""

import json

import pytest

from rlhf.ppo.ledger import Issue, Ledger, Lineage, Verdict
from support.rollouts import rollout, scored, version


def new_ledger(*, batch=2, max_steps=10, max_staleness=0, max_failures=3):
    ledger = Ledger(
        Lineage("run-1", {}, 0),
        batch=batch,
        max_steps=max_steps,
        max_staleness=max_staleness,
        max_failures=max_failures,
    )
    ledger.publish(0)
    return ledger


def issued(ledger):
    found = []
    while (issue := ledger.next_issue()) is not None:
        found.append(issue)
    return found


def made(index, step=0, epoch=0, attempt=0):
    return rollout(index, scored([1, 2, 3], 1, weights=version(step, epoch)), attempt=attempt)


def advance(ledger, batch):
    ledger.train(batch)
    ledger.publish(ledger.trained_steps)


def test_on_policy_admits_one_batch_per_published_step():
    ledger = new_ledger()
    assert issued(ledger) == [Issue(0, 0), Issue(1, 0)]
    ledger.train([made(0), made(1)])
    assert issued(ledger) == [], "the new weights are not out yet"
    ledger.publish(1)
    assert issued(ledger) == [Issue(2, 0), Issue(3, 0)]


def test_staleness_admits_further_batches():
    assert len(issued(new_ledger(max_staleness=2))) == 6


def test_nothing_is_issued_that_no_step_would_train_on():
    assert len(issued(new_ledger(max_steps=2, max_staleness=5))) == 4


def test_rollouts_of_older_weights_are_stale_and_their_prompts_go_out_again():
    ledger = new_ledger()
    issued(ledger)
    advance(ledger, [made(0), made(1)])
    issued(ledger)
    late = made(2, step=0)
    assert ledger.judge(late) is Verdict.STALE
    ledger.mark_stale(late)
    assert issued(ledger) == [Issue(2, 1)]
    assert ledger.judge(late) is Verdict.KNOWN
    assert ledger.judge(made(2, step=1, attempt=1)) is Verdict.TRAIN


def test_a_rollout_of_two_versions_is_as_stale_as_the_older():
    ledger = new_ledger(max_staleness=1)
    issued(ledger)
    advance(ledger, [made(0), made(1)])
    advance(ledger, [made(2, 1), made(3, 1)])
    issued(ledger)
    both = rollout(4, scored([1, 2], 1, weights=version(2)), scored([1, 2], 1, weights=version(0)))
    assert ledger.staleness(both) == 2
    assert ledger.judge(both) is Verdict.STALE


def test_a_trained_rollout_is_not_trained_again():
    ledger = new_ledger()
    issued(ledger)
    advance(ledger, [made(0), made(1)])
    assert ledger.judge(made(0)) is Verdict.KNOWN


def test_rollouts_of_another_run_are_not_ours():
    ledger = new_ledger()
    issued(ledger)
    assert ledger.judge(rollout(0, run_id="run-2")) is Verdict.KNOWN
    assert ledger.judge(rollout(0, scored([1, 2], 1, weights=version(0, run_id="run-2")))) is Verdict.STALE


def test_dead_prompts_go_out_again_until_they_are_abandoned():
    ledger = new_ledger(max_failures=2)
    issued(ledger)
    assert ledger.mark_dead("run-1/0/0", "it raised") is Verdict.DEAD
    assert ledger.mark_dead("run-1/0/0", "told twice") is Verdict.KNOWN
    assert ledger.mark_dead("run-1/9/0", "not issued yet") is Verdict.EARLY
    assert issued(ledger) == [Issue(0, 1)]
    assert ledger.mark_dead("run-1/0/1", "it raised again") is Verdict.DEAD
    assert ledger.abandoned == {0: "it raised again"}
    assert issued(ledger) == [Issue(2, 0)], "the next prompt takes its place"


def test_a_restart_goes_on_in_a_new_epoch_and_knows_the_undone_future():
    ledger = new_ledger()
    issued(ledger)
    advance(ledger, [made(0), made(1)])
    issued(ledger)
    saved = json.loads(json.dumps(ledger.to_json()))
    advance(ledger, [made(2, 1), made(3, 1)])
    issued(ledger)

    restored = new_ledger()
    restored.restore(saved, epoch=1)
    restored.publish(restored.trained_steps)
    assert issued(restored) == [Issue(2, 0), Issue(3, 0)], "what was outstanding goes out once more"
    assert restored.judge(made(2, step=1, epoch=0)) is Verdict.TRAIN, "its weights are the checkpoint's"
    assert restored.judge(made(3, step=2, epoch=0)) is Verdict.STALE, "step 2 of epoch 0 led nowhere"
    assert restored.judge(made(3, step=1, epoch=1)) is Verdict.TRAIN
    assert restored.judge(made(0, step=0)) is Verdict.KNOWN
    assert restored.trained == {"run-1/0/0": 0, "run-1/1/0": 0}


def test_what_an_undone_future_had_issued_is_early():
    ledger = new_ledger()
    assert ledger.judge(made(0)) is Verdict.EARLY
    issued(ledger)
    assert ledger.judge(made(0)) is Verdict.TRAIN
    assert ledger.judge(made(0, attempt=1)) is Verdict.EARLY


def test_an_epoch_is_never_used_twice():
    with pytest.raises(ValueError, match="epoch"):
        Lineage("run-1", {}, 3).restarted(10, 3)


def test_lineage_over_several_restarts():
    lineage = Lineage("run-1", {}, 0).restarted(10, 1).restarted(15, 4)
    contained = {(0, 10), (0, 3), (1, 15), (4, 40)}
    undone = {(0, 11), (1, 16), (2, 15), (3, 15)}
    assert all(lineage.contains(version(step, epoch)) for epoch, step in contained)
    assert not any(lineage.contains(version(step, epoch)) for epoch, step in undone)
