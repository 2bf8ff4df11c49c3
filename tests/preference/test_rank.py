"""`rlhf rank` from a file of samples to a file of judgments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from rlhf.data.rows import write_rows
from rlhf.data.samples import Sampled, SampledCompletion, write_samples
from rlhf.errors import DataError
from rlhf.feedback.judgments import read_judgments
from rlhf.preference.people import evidence_of
from rlhf.preference.rank import run
from rlhf.preference.settings import RankSettings
from rlhf.reward.rules import ScoreItem
from rlhf.settings.run import Settings
from rlhf.supervisor.settings import RunSettings
from rlhf.wire.records import FinishReason, Sampling, WeightVersion


def by_number(items: Sequence[ScoreItem]) -> list[float]:
    """A utility that is written in the completion, and sees prompt, tokens and metadata of its own item."""
    assert all(item.prompt.split()[1] == item.metadata["row"] and item.tokens == (1, 2) for item in items)
    return [float(item.completion) for item in items]


def by_last_digits(items: Sequence[ScoreItem]) -> list[float]:
    """Another taste, which has nothing to do with the first."""
    return [float(item.completion[-2:]) for item in items]


def all_alike(items: Sequence[ScoreItem]) -> list[float]:
    return [1.0] * len(items)


RULES = Path(__file__)


def sampled(index: int, texts: Sequence[str]) -> Sampled:
    completions = tuple(
        SampledCompletion(text, (1, 2), (-1.0, -1.0), FinishReason.EOS, 10 + k) for k, text in enumerate(texts)
    )
    version = WeightVersion("run", 0, 0, "f" * 64)
    return Sampled(index, f"prompt {index}", {"row": str(index)}, completions, Sampling(0.7), version)


def settings(folder: Path, prompts: int = 300, **rank: Any) -> Settings:
    rng = np.random.default_rng(5)
    chosen = Settings(run=RunSettings(folder=folder), rank=RankSettings(**{"utility": f"{RULES}:by_number"} | rank))
    rows = [sampled(index, [f"{value:.4f}" for value in rng.normal(size=4)]) for index in range(prompts)]
    write_samples(chosen.paths.samples, rows)
    return chosen


def test_judgments_carry_what_was_ranked(tmp_path: Path) -> None:
    chosen = settings(tmp_path, reliabilities=(1.0,))
    figures = run(chosen)
    judgments = read_judgments(chosen.paths.comparisons)
    assert [judgment.task_id for judgment in judgments] == [str(number) for number in range(300)]
    for judgment in judgments:
        best_first = sorted(range(4), key=lambda k: -float(judgment.texts[k]))
        assert [judgment.ranks[k] for k in best_first] == [1, 2, 3, 4]
        assert judgment.metadata == {"row": judgment.task_id}
        assert judgment.policy_version == "run/0-0/ffffffff"
        assert judgment.completions[1].sampling["temperature"] == 0.7
        assert [each.sampling["seed"] for each in judgment.completions] == [10, 11, 12, 13]
    assert figures == {
        "judgments": 300,
        "prompts": 300,
        "pairs": 1800,
        "ties": 0,
        "agreement": None,
        "reliability": {"simulated-0": 1.0},
    }


def test_realised_reliabilities_and_agreement_are_near_the_stated_ones(tmp_path: Path) -> None:
    figures = run(settings(tmp_path, prompts=1500, reliabilities=(0.95, 0.85, 0.7), judgments_per_prompt=3))
    reliability = figures["reliability"]
    stated = {"simulated-0": 0.95, "simulated-1": 0.85, "simulated-2": 0.7}
    assert reliability == pytest.approx(stated, abs=0.02)
    # Errors of two annotators fall on the same close pairs, so they agree a little more than independent ones would.
    independent = np.mean([p * q + (1 - p) * (1 - q) for p, q in ((0.95, 0.85), (0.95, 0.7), (0.85, 0.7))])
    assert independent < figures["agreement"] < independent + 0.06
    assert figures["judgments"] == 4500


def test_each_prompt_gets_different_annotators_and_all_get_their_share(tmp_path: Path) -> None:
    chosen = settings(tmp_path, judgments_per_prompt=2)
    run(chosen)
    judgments = read_judgments(chosen.paths.comparisons)
    assert len({(j.task_id, j.annotator) for j in judgments}) == len(judgments) == 600
    assert len({judgment.judgment_id for judgment in judgments}) == 600
    assert all(150 < count < 250 for count in Counter(j.annotator for j in judgments).values())


def test_the_order_shown_is_shuffled(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    run(chosen)
    orders = Counter(judgment.order_shown for judgment in read_judgments(chosen.paths.comparisons))
    assert len(orders) == 24


def test_the_seed_decides(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        chosen = settings(tmp_path / name, seed=seed)
        run(chosen)
        files.append(chosen.paths.comparisons.read_bytes())
    assert files[0] == files[1] != files[2]


def test_ties_are_counted(tmp_path: Path) -> None:
    chosen = settings(tmp_path, tie_margin=0.5, reliabilities=(1.0,))
    figures = run(chosen)
    tied = sum(
        j.ranks[a] == j.ranks[b] for j in read_judgments(chosen.paths.comparisons) for a in range(4) for b in range(a)
    )
    assert figures["ties"] == tied > 0
    assert figures["reliability"]["simulated-0"] == 1.0


def test_gold_and_repeats_tell_the_careless_from_the_dissenting(tmp_path: Path) -> None:
    kinds = ("honest", "honest", "minority", "random", "adversarial")
    given = {
        "reliabilities": (0.9,) * 5, "kinds": kinds, "judgments_per_prompt": 5, "gold_share": 0.2, "repeat_share": 0.1,
        "minority_utility": f"{RULES}:by_last_digits",
    }  # fmt: skip
    chosen = settings(tmp_path, prompts=60, **given)
    figures = run(chosen)
    judgments = read_judgments(chosen.paths.comparisons)
    assert Counter(each.source for each in judgments) == {"simulated": 300, "gold": 60, "repeat": 30}
    assert (figures["judgments"], figures["gold_judgments"], figures["repeat_judgments"]) == (300, 60, 30)
    assert len({each.judgment_id for each in judgments}) == len(judgments)
    of_the_samples = {shown for each in judgments if each.source == "simulated" for shown in map(str, each.completions)}
    for gold in (each for each in judgments if each.source == "gold"):
        assert set(map(str, gold.completions)) <= of_the_samples
        better, worse = gold.texts if gold.metadata["gold_ranks"] == "[1, 2]" else gold.texts[::-1]
        assert float(better) > float(worse)
        assert float(better[-2:]) > float(worse[-2:])
    evidence = evidence_of(judgments, [np.array([float(text) for text in each.texts]) for each in judgments])
    verdicts = {name: own.verdict() for name, own in evidence.items()}
    assert verdicts == dict(zip(verdicts, ("honest", "honest", "dissenting", "random", "adversarial"), strict=True))


def test_there_is_no_gold_for_a_taste_to_which_all_is_alike(tmp_path: Path) -> None:
    given = {"kinds": ("honest", "honest", "minority"), "minority_utility": f"{RULES}:all_alike", "gold_share": 0.2}
    assert "gold_judgments" not in run(settings(tmp_path, prompts=20, **given))


def test_gold_and_repeats_change_nothing_else(tmp_path: Path) -> None:
    plain, checked = settings(tmp_path / "a"), settings(tmp_path / "b", gold_share=0.1, repeat_share=0.1)
    run(plain)
    run(checked)
    found = [each for each in read_judgments(checked.paths.comparisons) if each.source == "simulated"]
    assert found == read_judgments(plain.paths.comparisons)


def test_nothing_to_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all completions of each prompt the same utility"):
        run(settings(tmp_path, utility=f"{RULES}:all_alike"))
    single = settings(tmp_path)
    write_samples(single.paths.samples, [sampled(0, ["1"])])
    with pytest.raises(DataError, match="a single completion"):
        run(single)


def test_nobody_ranks_a_prompt_twice() -> None:
    with pytest.raises(ValidationError, match="nobody ranks twice"):
        RankSettings(reliabilities=(0.9, 0.8), judgments_per_prompt=3)


def test_the_worlds_taste_is_a_utility(tmp_path: Path) -> None:
    chosen = settings(tmp_path, utility="rlhf.data.world:annotators_taste", reliabilities=(1.0,))
    texts = [" was awful.", " was brilliant."]
    write_samples(chosen.paths.samples, [sampled(0, texts)])
    run(chosen)
    assert read_judgments(chosen.paths.comparisons)[0].ranks == (2, 1)


def test_held_out_completions_are_ranked_without_noise(tmp_path: Path) -> None:
    chosen = settings(tmp_path, reliabilities=(0.6,))
    run(chosen)
    assert not chosen.paths.heldout_comparisons.exists()
    rows = [sampled(index, [f"{(index * 7 + k * 3) % 10}" for k in range(4)]) for index in range(50)]
    write_samples(chosen.paths.heldout_samples, rows)
    assert run(chosen)["judgments"] == 300
    judgments = read_judgments(chosen.paths.heldout_comparisons)
    assert len(judgments) == 50
    for judgment in judgments:
        assert judgment.annotator == "noise-free"
        values = [float(text) for text in judgment.texts]
        assert judgment.ranks == tuple(1 + sum(other > own for other in values) for own in values)


def test_a_taste_is_learnt_from_labelled_texts(tmp_path: Path) -> None:
    chosen = settings(tmp_path, utility="", reliabilities=(1.0,))
    words = {"awful": "negative", "fine": "positive"}
    rows = [{"text": f"film {n} is {word}", "label": words[word]} for n in range(30) for word in words]
    write_rows(chosen.paths.annotators_labelled, rows)
    write_samples(chosen.paths.samples, [sampled(n, [" is fine", " is awful", " is"]) for n in range(3)])
    run(chosen)
    assert {judgment.ranks for judgment in read_judgments(chosen.paths.comparisons)} == {(1, 3, 2)}


def upside_down(items: Sequence[ScoreItem]) -> list[float]:
    return [-float(item.completion) for item in items]


def test_kinds_of_annotators(tmp_path: Path) -> None:
    chosen = settings(
        tmp_path,
        reliabilities=(1.0, 1.0, 1.0),
        kinds=("honest", "minority", "adversarial"),
        minority_utility=f"{RULES}:upside_down",
        judgments_per_prompt=3,
    )
    assert run(chosen)["reliability"] == {"simulated-0": 1.0, "simulated-1": 0.0, "simulated-2": 0.0}


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("honest",), "as many as reliabilities"),
        (("kind", "honest", "honest"), "not kind"),
        (("minority", "honest", "honest"), "minority_utility must be set"),
        (("targeted", "honest", "honest"), "trigger must be set"),
    ],
)
def test_kinds_that_make_no_sense_are_refused(kinds: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RankSettings(kinds=kinds)
