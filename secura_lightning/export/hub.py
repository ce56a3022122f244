"""Upload a written folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from secura_lightning.errors import ConfigError, SecuraError

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def check_repo(repo: str | None) -> None:
    """Refuse what cannot be a repository's name, before any work is done.

    Raises:
        ConfigError: ``repo`` is not of the form owner/name.
    """
    if repo is not None and not _REPO.fullmatch(repo):
        raise ConfigError(f"--push {repo}: give OWNER/NAME, such as me/my-model")


def push(folder: Path, repo: str, public: bool = False) -> str:
    """Create the repository where it is missing (private unless ``public``) and upload every file of ``folder``.

    Returns:
        The commit's address.

    Raises:
        SecuraError: The hub refused, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        commit = api.upload_folder(folder_path=folder, repo_id=repo, commit_message=f"Upload {folder.name}")
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()
        raise SecuraError(
            f"--push {repo}: {first[0] if first else type(error).__name__}; the folder {folder} is written "
            "(log in with `hf auth login`, then try again or upload it yourself)"
        ) from error
    return str(getattr(commit, "commit_url", commit))
