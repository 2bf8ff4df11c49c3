"""Adapters on one trunk: members that compute what models of their own would, in the memory of one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from rlhf.errors import ModelError
from rlhf.models.adapters import ADAPTER_FILE, CONFIG_FILE, Factors
from rlhf.models.ensemble import RewardEnsemble, reward_sha256
from rlhf.models.folders import write_json
from rlhf.models.padding import pad
from rlhf.models.reward import RewardModel
from rlhf.models.weights import named_weights
from support.tiny import tiny_adapted_folder, tiny_adapters

BATCH = pad([[5, 6, 7, 0], [9, 10, 0], [30, 31, 32, 33, 34, 0], [8, 0]], 1)
MEMBERS, RANK, SCALING = 3, 2, 2.0


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    return tiny_adapted_folder(tmp_path_factory.mktemp("adapted") / request.param, request.param, MEMBERS)


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """To damage."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def start_of(folder: Path) -> RewardModel:
    return RewardModel.new(folder.with_name(f"{folder.name}-start"), seed=1)


@torch.no_grad()
def full_model(start: RewardModel, factors: Factors) -> RewardModel:
    """With W + s·B·A as its weights, in a plain sum."""
    for name, (left, right) in factors.items():
        layer, product = start.trunk.get_submodule(name), SCALING * (left @ right)
        layer.weight += product.T if isinstance(layer, Conv1D) else product  # type: ignore[operator]
    return start


@torch.no_grad()
def values_of(model: RewardEnsemble, batch: tuple[Tensor, Tensor] = BATCH) -> Tensor:
    """[tokens, M], of the tokens that count."""
    return model.token_values(*batch)[batch[1]]


def test_putting_adapters_on_and_taking_them_off_leaves_the_trunk_alone(folder: Path) -> None:
    base, untouched = start_of(folder), start_of(folder)
    drawn = tiny_adapters(base, 2)
    assert named_weights(base).keys() == named_weights(untouched).keys()
    assert all(torch.equal(tensor, named_weights(untouched)[name]) for name, tensor in named_weights(base).items())
    first, second = (next(iter(factors.values()))[1] for factors in drawn)
    assert not torch.equal(first, second), "each has a start of its own"


def test_each_member_is_the_full_model_with_its_weights(folder: Path) -> None:
    model = RewardEnsemble.load(folder)
    drawn = tiny_adapters(start_of(folder), MEMBERS)
    heads = model.heads
    with torch.no_grad():
        found = [trunk.hidden(*BATCH) for trunk in model.trunks]  # type: ignore[operator]
        full = [full_model(start_of(folder), factors).hidden(*BATCH) for factors in drawn]
    for own, expected in zip(found, full, strict=True):
        torch.testing.assert_close(own[BATCH[1]], expected[BATCH[1]], atol=1e-5, rtol=1e-5)
    raw = torch.stack([hidden[BATCH[1]] @ heads.weight[m, 0] for m, hidden in enumerate(full)], -1)
    expected = (raw - heads.mean[:, 0]) / heads.std[:, 0]
    torch.testing.assert_close(values_of(model), expected, atol=1e-4, rtol=1e-4)
    assert float(expected.std(-1).min()) > 1e-2, "members differ"


def test_whoever_reads_a_single_model_reads_the_first_member(folder: Path) -> None:
    model, single = RewardEnsemble.load(folder), RewardModel.load(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    last = BATCH[1].sum(1) - 1
    with torch.no_grad():
        values = model.token_values(*BATCH)[torch.arange(len(last)), last, 0]
        torch.testing.assert_close(single(*BATCH), values, atol=1e-6, rtol=0)
        raw = plain(BATCH[0], attention_mask=BATCH[1].long()).logits[:, 0]
    torch.testing.assert_close((raw - single.mean) / single.std, values, atol=1e-5, rtol=0)


# peft asks transformers by a name that is to go.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_reads_the_others(folder: Path) -> None:
    model = RewardEnsemble.load(folder)
    ids, mask = BATCH
    for member in range(1, MEMBERS):
        trunk = AutoModel.from_pretrained(folder)
        by_peft = PeftModel.from_pretrained(trunk, str(folder / "members" / str(member)))
        with torch.no_grad():
            expected = by_peft(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            found = model.trunks[member].hidden(ids, mask)  # type: ignore[operator]
        torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=0)


def test_an_adapter_is_off_again_after_each_pass_and_after_one_that_failed(folder: Path) -> None:
    model = RewardEnsemble.load(folder)
    with torch.no_grad():
        before = model.first.hidden(*BATCH)
        model.trunks[1].hidden(*BATCH)  # type: ignore[operator]
        with pytest.raises(IndexError):
            model.trunks[1].hidden(BATCH[0] + 10_000, BATCH[1])  # type: ignore[operator]
        assert torch.equal(model.first.hidden(*BATCH), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_holds_the_base_once_and_factors_for_the_others(folder: Path, dtype: str) -> None:
    model = RewardEnsemble.load(folder, dtype=dtype)
    drawn = tiny_adapters(start_of(folder), 1)[0].values()
    adapter = sum(2 * left.numel() + 2 * right.numel() for left, right in drawn)
    single = sum(parameter.numel() for parameter in RewardModel.load(folder).parameters())
    held = list(model.parameters())
    assert sum(parameter.numel() for parameter in held) == single + (MEMBERS - 1) * adapter
    assert {parameter.dtype for parameter in held} == {getattr(torch, dtype)}


def test_bfloat16_errs_no_more_than_in_a_full_model(folder: Path) -> None:
    served, drawn = RewardEnsemble.load(folder, dtype="bfloat16"), tiny_adapters(start_of(folder), MEMBERS)
    ids = torch.randint(2, 270, (64, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    for trunk, factors in zip(served.trunks, drawn, strict=True):
        full = full_model(start_of(folder), factors)
        with torch.no_grad():
            exact = full.hidden(ids, mask)
            found = [each.hidden(ids, mask).float() for each in (trunk, full.to(torch.bfloat16))]  # type: ignore[operator]
        own, allowed = (float((hidden - exact).square().mean().sqrt()) for hidden in found)
        # One more sum is rounded: of the trunk's output and the adapter's.
        assert own < 2 * allowed


@pytest.mark.parametrize("padding", [(3, 0), (0, 3)])
def test_padding_changes_nothing(folder: Path, padding: tuple[int, int]) -> None:
    model = RewardEnsemble.load(folder)
    ids, mask = (torch.nn.functional.pad(each, padding) for each in BATCH)
    torch.testing.assert_close(values_of(model, (ids, mask)), values_of(model), atol=1e-4, rtol=1e-4)


def test_serving_imports_no_peft(tmp_path: Path) -> None:
    folder = tiny_adapted_folder(tmp_path / "adapted", members=MEMBERS)
    code = (
        "import sys\n"
        "from rlhf.models.ensemble import RewardEnsemble\n"
        "assert RewardEnsemble.load(sys.argv[1]).members == 3\n"
        "sys.exit('peft' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def of_another_model(file: Path) -> None:
    """Of the other architecture."""
    other = "llama" if b"c_attn" in file.read_bytes() else "gpt2"
    place = tiny_adapted_folder(file.parents[3] / other, other, 2)
    shutil.copy(place / "members" / "1" / ADAPTER_FILE, file)


def changed(**values: object) -> Callable[[Path], None]:
    return lambda file: write_json(file, {**json.loads(file.read_text()), **values})


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (ADAPTER_FILE, Path.unlink, "is missing or damaged"),
        (ADAPTER_FILE, cut, "is missing or damaged"),
        (ADAPTER_FILE, of_another_model, "does not fit the model"),
        (CONFIG_FILE, Path.unlink, "is missing or damaged"),
        (CONFIG_FILE, cut, "is missing or damaged"),
        (CONFIG_FILE, lambda file: file.write_text("[]"), "is missing or damaged"),
        (CONFIG_FILE, changed(r=8), "another rank"),
        (CONFIG_FILE, changed(lora_alpha=0), "above 0 expected"),
    ],
)
def test_damage_is_named_with_its_file_and_what_to_do(
    own: Path, name: str, damage: Callable[[Path], None], says: str
) -> None:
    damage(own / "members" / "2" / name)
    with pytest.raises(ModelError, match=rf"members/2/adapter_.*{says}.*copy the whole folder.*or train it again"):
        RewardEnsemble.load(own)


@pytest.mark.parametrize("name", [ADAPTER_FILE, CONFIG_FILE])
def test_the_hash_covers_every_byte_of_an_adapter(own: Path, name: str) -> None:
    before, file = reward_sha256(own), own / "members" / "1" / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert reward_sha256(own) != before
    file.unlink()
    with pytest.raises(ModelError, match=rf"members/1/{name} is missing"):
        reward_sha256(own)


def test_equal_models_have_equal_hashes(folder: Path, tmp_path: Path) -> None:
    again = tiny_adapted_folder(tmp_path / "again", folder.name, MEMBERS)
    assert reward_sha256(again) == reward_sha256(folder)
