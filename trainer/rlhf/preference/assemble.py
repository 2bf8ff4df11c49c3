"""From what was trained to what is served: groups of like taste, one scale for all, one folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.data.rows import read_rows
from rlhf.errors import DataError
from rlhf.models.ensemble import Heads, Trunk, about, member_folders, raw_values, save_heads
from rlhf.models.folders import sha256_file
from rlhf.models.padding import pad
from rlhf.models.reward import REFERENCE_SET_FILE, RewardModel, ended
from rlhf.preference.calibration import Floats
from rlhf.preference.comparisons import Comparison, sha256_of
from rlhf.preference.fit import Fitted
from rlhf.preference.judged import Judged
from rlhf.preference.people import Groups, evidence_of, groups_of
from rlhf.preference.reliability import Evidence
from rlhf.preference.settings import RewardModelSettings
from rlhf.sft.loop import autocast

REFERENCE_SET_SIZE = 512


@dataclass(frozen=True)
class Assembled:
    trunks: list[Trunk]
    """The first is a `RewardModel`, whose head, mean and std are those of the single model that the folder is to
    whoever reads one."""
    heads: Heads
    """Normalised."""
    people: Tensor
    """[M, H] float32: the raw head of the mean over people, in whose scale differences are log-odds."""
    reference: list[tuple[str, str]]
    evidence: dict[str, Evidence] = field(default_factory=dict)
    """By annotator; empty where nothing is learnt of them."""
    groups: Groups | None = None
    reliability: dict[str, dict[str, float]] = field(default_factory=dict)
    """By annotator: the shares of its kinds of judging, as they were fitted."""

    @property
    def single(self) -> RewardModel:
        return self.trunks[0]  # type: ignore[return-value]

    def raw_scores(self, sequences: Sequence[Sequence[int]], pad_id: int, section: RewardModelSettings) -> Floats:
        """[N]: mean over members and people, before normalisation."""
        scores = raw_scores(self.trunks, self.people[:, None], sequences, pad_id, section)
        return np.asarray(scores[:, :, 0].mean(1), dtype=np.float64)


@torch.no_grad()
def raw_scores(
    trunks: Sequence[Trunk],
    weight: Tensor,
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    section: RewardModelSettings,
) -> Floats:
    """[N, M, G], in batches of sequences of like length.

    Args:
        weight: [M, G, H] of heads.
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    scores = np.zeros((len(sequences), *weight.shape[:2]))
    for start in range(0, len(order), 64):
        some = order[start : start + 64]
        ids, mask = (each.to(trunks[0].device) for each in pad([sequences[index] for index in some], pad_id))
        with autocast(section):
            hidden = [trunk.last_hidden(ids, mask) for trunk in trunks]
        scores[some] = raw_values(hidden, weight.to(ids.device)).cpu().numpy()
    return scores


def assemble(fitted: Fitted, judged: Judged, section: RewardModelSettings) -> Assembled:
    """
    Raises:
        ModelError: a head scores the whole reference set alike.
        DataError: the reference set asked for is not there, or a gold judgment does not say what is right.
    """
    trunks, single = fitted.trunks, fitted.models[0].reward
    own = torch.cat([model.group_heads(None) for model in fitted.models])
    reference = reference_set(judged.training, section)
    evidence = _evidence(trunks, own, judged, section) if section.annotators != "none" else {}
    groups = _groups(fitted, evidence, judged, section) if section.annotators == "groups" else None
    weight = own if groups is None else torch.cat(list(_group_heads(fitted, groups)))
    shares = torch.ones(1) if groups is None else torch.from_numpy(groups.shares).float()
    heads = Heads(weight.cpu(), torch.zeros(1), torch.ones(1), shares, section.combine, section.combine_quantile)
    raw = torch.from_numpy(raw_scores(trunks, weight, _encoded(reference, single, judged), judged.pad_id, section))
    heads = heads.normalised(raw)
    people = (heads.weight * shares[:, None]).sum(1)
    _make_single(single, trunks[1:], heads, raw)
    return Assembled(trunks, heads, people, reference, evidence, groups, _reliability(fitted))


def save(
    out: Path, assembled: Assembled, judged: Judged, section: RewardModelSettings, figures: dict[str, Any]
) -> None:
    """
    Raises:
        StorageError: the disk is full or the folder cannot be written; the old folder stays.
    """
    single, heads = assembled.single, assembled.heads
    single.facts = {
        "reference_set_sha256": reference_sha256(assembled.reference),
        "comparisons_sha256": _judgments_sha256(judged),
        "snapshot_sha256": judged.snapshot_sha256,
        "loss": section.loss,
        "annotators": section.annotators,
        "figures": figures,
    }
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in assembled.reference]
    alone = heads.members == 1 and heads.groups == 1
    if not alone:
        single.facts["ensemble"] = about(heads, section.trunk if len(assembled.trunks) > 1 else "shared")
        single.facts["groups"] = [] if assembled.groups is None else assembled.groups.as_json()

    def beside(folder: Path) -> None:
        if not alone:
            save_heads(folder, heads)
        for place, trunk in zip(member_folders(folder, heads.members), assembled.trunks[1:], strict=False):
            if isinstance(trunk, RewardModel):
                trunk.save(place, judged.tokenizer)
            else:
                trunk.save(place)

    single.save(out, judged.tokenizer, rows, beside)


def reference_set(training: Sequence[Comparison], section: RewardModelSettings) -> list[tuple[str, str]]:
    """Prompts and completions whose scores get mean 0 and std 1: those of an earlier model, or a fixed draw from the
    training judgments.

    Raises:
        DataError: the earlier model has none.
    """
    if section.reference_set is not None:
        path = section.reference_set / REFERENCE_SET_FILE
        if not path.is_file():
            raise DataError("reward_model.reference_set names a folder without a reference set", path=path)
        # A completion may be empty: a policy may end at once.
        return [(row.text("prompt"), str(row.require("completion", str, "a string"))) for row in read_rows(path)]
    distinct = sorted({(each.prompt, completion) for each in training for completion in each.completions})
    drawn = np.random.default_rng(section.seed).permutation(len(distinct))[:REFERENCE_SET_SIZE]
    return [distinct[index] for index in sorted(drawn.tolist())]


def reference_sha256(reference: Sequence[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(reference).encode()).hexdigest()


def _encoded(reference: Sequence[tuple[str, str]], model: RewardModel, judged: Judged) -> list[list[int]]:
    prompts = judged.tokenizer([prompt for prompt, _ in reference]).input_ids
    completions = judged.tokenizer([completion for _, completion in reference], add_special_tokens=False).input_ids
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return [ended(ids, judged.tokenizer.eos_token_id, model.context_tokens) for ids in whole]


def _evidence(
    trunks: Sequence[Trunk], own: Tensor, judged: Judged, section: RewardModelSettings
) -> dict[str, Evidence]:
    both = [*judged.training, *judged.heldout]
    sequences = [sequence for comparison in both for sequence in comparison.token_ids]
    scores = raw_scores(trunks, own, sequences, judged.pad_id, section)[:, :, 0].mean(1)
    ends = np.cumsum([len(comparison.ranks) for comparison in both])
    return evidence_of([comparison.judgment for comparison in both], np.split(scores, ends[:-1]))


def _groups(fitted: Fitted, evidence: dict[str, Evidence], judged: Judged, section: RewardModelSettings) -> Groups:
    """By the first model's tastes; the others have directions of their own for the same people."""
    model, names = fitted.models[0], list(fitted.numbering.annotators)
    assert model.annotators is not None, "section.annotators is groups"
    sequences = [sequence for comparison in judged.training for sequence in comparison.token_ids]
    g = raw_scores([model.reward], model.taste_heads.detach()[None], sequences, judged.pad_id, section)[:, 0]
    honesty = model.annotators.log_shares[:, 0].exp().detach().cpu().double().numpy()
    tastes = model.annotators.tastes.detach().cpu().double().numpy()
    verdicts = {name: own.verdict() for name, own in evidence.items()}
    return groups_of(tastes, np.cov(g.T), honesty, names, verdicts, section.groups)


def _group_heads(fitted: Fitted, groups: Groups) -> list[Tensor]:
    """[M, G, H] of each model."""
    names = list(fitted.numbering.annotators)
    inside = torch.tensor([[groups.of.get(name) == group for name in names] for group in range(len(groups.shares))])
    heads = []
    for number, model in enumerate(fitted.models):
        assert model.annotators is not None, "section.annotators is groups"
        tastes = model.annotators.tastes.detach().cpu()
        means = torch.stack([tastes[mask].mean(0) for mask in inside])
        heads.append(model.group_heads(torch.from_numpy(groups.centres).float() if number == 0 else means))
    return heads


def _make_single(first: RewardModel, others: Sequence[Trunk], heads: Heads, raw: Tensor) -> None:
    """The first trunk's head: the mean over its members of the mean over people, each as it is normalised."""
    own = slice(0, 1) if others else slice(None)
    if heads.members == 1 and heads.groups == 1:
        weight, scores = heads.weight[0], raw[:, 0, 0]
    else:
        scale = heads.shares / heads.std[own]
        weight = (heads.weight[own] * scale[..., None]).sum(1).mean(0, keepdim=True)
        scores = (raw[:, own] * scale).sum(-1).mean(1)
    with torch.no_grad():
        first.head.weight.copy_(weight)
    first.normalise(scores)
    for member, trunk in enumerate(others, start=1):
        if isinstance(trunk, RewardModel):
            with torch.no_grad():
                trunk.head.weight.copy_((heads.weight[member] * heads.shares[:, None]).sum(0, keepdim=True))


def _reliability(fitted: Fitted) -> dict[str, dict[str, float]]:
    """Mean over models."""
    modelled = [model.annotators for model in fitted.models if model.annotators is not None]
    if not modelled:
        return {}
    shares = torch.stack([each.log_shares.exp().detach().cpu() for each in modelled]).mean(0).tolist()
    names = fitted.numbering.annotators
    return {name: dict(zip(modelled[0].kinds, shares[number], strict=True)) for name, number in names.items()}


def _judgments_sha256(judged: Judged) -> str:
    if judged.source.is_file():
        return sha256_file(judged.source)
    return sha256_of([*judged.training, *judged.heldout])
