"""Puts the folder of a plan onto the Hugging Face hub, and fetches it from there."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resting.sparsifier.errors import PlanError

FILES = ("plan.json", "rules.safetensors")
"""All that is fetched: data, and no code."""


def push(
    repo_id: str,
    write: Callable[[Path], object],
    readme: str,
    private: bool,
    token: str | bool | None,
    revision: str | None,
    message: str,
) -> str:
    """Uploads what `write` puts into a folder, with a README beside it, into a model repository.

    The repository is made where there is none.

    Returns
    -------
    str
        The address of the commit.

    Raises
    ------
    PlanError
        If the hub refuses or cannot be reached, or if `private` is asked for and the repository is public.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="resting-hub-") as work:
        folder = Path(work) / "plan"
        write(folder)  # first, so that a plan that cannot be saved makes no repository
        (folder / "README.md").write_text(readme)
        try:
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(repo_id).private:
                raise PlanError(f"the repository {repo_id} is there already and public: nothing was uploaded")
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision, repo_type="model"
            )
        except PlanError:
            raise
        except Exception as error:
            raise PlanError(f"the plan cannot be pushed to {repo_id!r}: {_reason(error, revision)}") from error
    return str(done.commit_url)


def fetch(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: Path | str | None, subfolder: str | None
) -> Path:
    """Downloads the files of a plan into the hub's cache; what is there already is not fetched again.

    Returns
    -------
    Path
        The folder that holds them.

    Raises
    ------
    PlanError
        If there is no such repository, it has no plan, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        found = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=[f"{inside}{name}" for name in FILES],
        )
    except Exception as error:
        here = "; a folder on this machine is read by Plan.load" if Path(repo_id).exists() else ""
        raise PlanError(f"the hub gave no plan for {repo_id!r}: {_reason(error, revision)}{here}") from error
    folder = Path(found) / inside
    for name in FILES:
        if not (folder / name).is_file():
            where = f"{repo_id}/{inside}".rstrip("/")
            raise PlanError(f"the repository {where} on the hub has no plan: it lacks {name}")
    return folder


def _reason(error: Exception, revision: str | None) -> str:
    """Says in one sentence why the hub gave nothing."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated: ask for access on its page, and give a token"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private and the token does not open it"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r}"
    if isinstance(error, errors.HFValidationError):
        return "that is no id of a repository; allowed: organisation/name"
    if isinstance(error, errors.LocalTokenNotFoundError) or _status(error) in (401, 403):
        return "the hub takes no token for it: log in with `hf auth login`, or give token="
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub is not asked, because HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it is not in the cache, and the hub cannot be reached or is not asked (HF_HUB_OFFLINE)"
    lines = re.split(r"\s*\n\s*", str(error).strip())
    return f"the hub cannot be reached or refuses ({type(error).__name__}: {lines[0][:200]})"


def _status(error: Any) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
