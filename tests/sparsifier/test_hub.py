"""Plans on the hub: real code up to huggingface_hub's own functions, behind which stands a folder."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, errors

from resting.baselines.teal import Teal
from resting.sparsifier import Plan, PlanError, Rule, Site, Transform


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: repositories are folders of it, and what was asked is kept."""
    root, asked = tmp_path / "hub", []

    class Api:
        def __init__(self, token=None):
            asked.append(("token", token))

        def create_repo(self, repo_id, *, private=None, exist_ok=False):
            assert exist_ok
            huggingface_hub.utils.validate_repo_id(repo_id)
            folder = root / repo_id
            if not folder.exists():
                folder.mkdir(parents=True)
                (folder / ".visibility").write_text("private" if private else "public")

        def repo_info(self, repo_id):
            return SimpleNamespace(private=(root / repo_id / ".visibility").read_text() == "private")

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision, repo_type):
            asked.append(("commit", commit_message, revision, repo_type))
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(repo_id, *, revision=None, token=None, cache_dir=None, allow_patterns=None):
        huggingface_hub.utils.validate_repo_id(repo_id)
        asked.append(("download", revision, token, cache_dir))
        if not (root / repo_id).exists():
            raise errors.RepositoryNotFoundError("404\nand more", response=answer(404))
        found = tmp_path / "snapshot"
        shutil.rmtree(found, ignore_errors=True)
        for name in allow_patterns:
            if (root / repo_id / name).exists():
                (found / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / repo_id / name, found / name)
        return str(found)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(root=root, asked=asked)


def answer(status: int) -> SimpleNamespace:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.fixture
def plan():
    rules = {Site(0, "q"): Rule(threshold=0.25), Site(1, "down"): Rule(threshold=0.5, bias=torch.arange(4.0))}
    info = {
        "matched": 0.50123,
        "curve": [1.0, 0.5],
        "ratios": {"0.q": 0.4},
        "fitted": {"model": "some/model", "loss": 0.25, "text": "a|b <i>"},
    }
    return Plan(rules, "a-method", 0.5, 0.48, "f" * 64, "c" * 64, info)


def test_what_is_pushed_comes_back(hub, plan):
    address = plan.push_to_hub("me/plan", token="t")
    assert address == "https://hub/me/plan/commit/1"
    assert ("token", "t") in hub.asked
    assert ("commit", "Plan: a-method at 0.5", None, "model") in hub.asked
    again = Plan.from_hub("me/plan", revision="main", token="t", cache_dir="c")
    assert ("download", "main", "t", "c") in hub.asked
    assert again.meta() == plan.meta()
    assert list(again.rules) == list(plan.rules)
    assert torch.equal(again.rules[Site(1, "down")].bias, torch.arange(4.0))
    assert again.rules[Site(0, "q")].threshold == 0.25


def test_a_fitted_plan_from_the_hub_is_applied(hub, llama, calibration, ids):
    plan = Teal(target=0.5).fit(llama, calibration)
    plan.push_to_hub("me/plan")
    with torch.no_grad():
        with plan.applied(llama):
            expected = llama(ids).logits
        with Plan.from_hub("me/plan").applied(llama):
            assert torch.equal(llama(ids).logits, expected)


def test_the_card_is_one_that_the_hub_reads(hub, plan):
    plan.push_to_hub("me/plan")
    card = ModelCard.load(hub.root / "me" / "plan" / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "some/model"
    assert data["library_name"] == "resting-neurons"
    assert "activation-sparsity" in data["tags"]
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", card.text, re.MULTILINE))
    assert rows["method"] == "`a-method`"
    assert rows["share of weight bytes left unread, measured on calibration text"] == "0.5012"
    assert (rows["fitted: loss"], rows["fitted: text"]) == ("0.25", "a\\|b &lt;i>")
    assert (rows["masks"], rows["biases"]) == ("2", "1")
    assert "0.q" not in card.text
    assert 'Plan.from_hub("me/plan")' in card.text


def test_a_card_names_no_folder_of_the_machine(hub, plan, tmp_path):
    plan.info["fitted"] |= {"model": str(tmp_path / "my-model"), "source": str(tmp_path / "my-model")}
    plan.push_to_hub("me/plan")
    assert str(tmp_path) not in (hub.root / "me" / "plan" / "plan.json").read_text()
    assert plan.info["fitted"]["source"] == str(tmp_path / "my-model")
    text = (hub.root / "me" / "plan" / "README.md").read_text()
    assert "`my-model`" in text
    assert str(tmp_path) not in text
    assert "base_model" not in ModelCard(text).data.to_dict()


def test_a_public_repository_does_not_take_a_private_plan(hub, plan):
    plan.push_to_hub("me/plan", private=True)
    plan.push_to_hub("me/plan", private=True)
    plan.push_to_hub("me/open")
    (hub.root / "me" / "open" / "README.md").unlink()
    with pytest.raises(PlanError, match="me/open is there already and public: nothing was uploaded"):
        plan.push_to_hub("me/open", private=True)
    assert not (hub.root / "me" / "open" / "README.md").exists()


def test_a_plan_that_cannot_be_saved_makes_no_repository(hub, plan):
    plan.info["x"] = object()
    with pytest.raises(PlanError, match="cannot be saved"):
        plan.push_to_hub("me/plan")
    assert not (hub.root / "me").exists()


def test_a_plan_in_a_folder_of_a_repository(hub, plan):
    plan.save(hub.root / "me" / "model" / "masks")
    assert Plan.from_hub("me/model", subfolder="masks/").method == "a-method"
    with pytest.raises(PlanError, match=r"me/model on the hub has no plan: it lacks plan\.json"):
        Plan.from_hub("me/model")


def test_a_plan_of_a_newer_format_says_so(hub, plan):
    plan.push_to_hub("me/plan")
    file = hub.root / "me" / "plan" / "plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(PlanError, match=r"me/plan on the hub: .* newer than 1, namely 99: update resting-neurons"):
        Plan.from_hub("me/plan")


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("me/nothing", "'me/nothing': there is no such repository, or it is private"),
        ("a/b/c", "that is no id of a repository; allowed: organisation/name"),
        ("", "that is no id of a repository"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(hub, repo_id, message):
    with pytest.raises(PlanError, match=message) as raised:
        Plan.from_hub(repo_id)
    assert "\n" not in str(raised.value)


def test_a_folder_is_read_by_load(hub, plan, tmp_path, monkeypatch):
    plan.save(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=r"a folder on this machine is read by Plan\.load"):
        Plan.from_hub("mine")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("x", response=answer(403)), "the repository is gated"),
        (errors.RevisionNotFoundError("x", response=answer(404)), "has no revision 'old'"),
        (errors.HfHubHTTPError("x", response=answer(401)), "log in with `hf auth login`"),
        (errors.HfHubHTTPError("full\nbody", response=answer(500)), "refuses .HfHubHTTPError: full."),
        (errors.OfflineModeIsEnabled("x"), "because HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError("x"), "not in the cache, and the hub cannot be reached"),
        (ConnectionError("no route"), "cannot be reached or refuses .ConnectionError: no route."),
    ],
)
def test_what_the_hub_says_is_one_sentence(plan, monkeypatch, error, message):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub, "HfApi", fails)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fails, raising=False)
    with pytest.raises(PlanError, match=message):
        Plan.from_hub("me/plan", revision="old")
    with pytest.raises(PlanError, match=message):
        plan.push_to_hub("me/plan", revision="old")


def test_offline_and_not_in_the_cache(tmp_path):
    """Huggingface_hub itself, without a network."""
    with pytest.raises(PlanError, match=r"the hub gave no plan for 'me/plan': .*\(HF_HUB_OFFLINE\)"):
        Plan.from_hub("me/plan", cache_dir=tmp_path)


def test_a_transform_goes_with_the_plan(hub, plan):
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    transform = Transform("one rotation", True, (rotation,), (0, 0), (0, 0))
    replace(plan, transform=transform).push_to_hub("somebody/rotated")
    readme = (hub.root / "somebody/rotated/README.md").read_text()
    assert "| the model is rewritten first, exactly | `one rotation` |" in readme
    found = Plan.from_hub("somebody/rotated").transform
    assert torch.equal(found.rotations[0], rotation)
    assert found.meta() == transform.meta()
