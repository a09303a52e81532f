"""`--push-to-hub`: upload an exported folder. Never without being asked, never without a token, private by default."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from remix_cli.errors import RecipeError, shortened


def check_push(repo: str) -> Any:
    """The hub's client, before anything is exported. Raises RecipeError if an upload could not work."""
    if constants.HF_HUB_OFFLINE:
        raise RecipeError("--push-to-hub: HF_HUB_OFFLINE is set; unset it to upload")
    if not huggingface_hub.get_token():
        raise RecipeError("--push-to-hub: no token; run `hf auth login` or set HF_TOKEN")
    if repo.count("/") != 1:
        raise RecipeError(f"--push-to-hub: {repo!r} is not a repository; write NAME/MODEL")
    return huggingface_hub.HfApi()


def push(client: Any, folder: Path, repo: str, public: bool) -> str:
    """Upload `folder` and return its address. Raises RecipeError: what the hub refused, or a repository that others
    can read without `public`."""
    try:
        client.create_repo(repo, private=not public, exist_ok=True)
        if not public and not client.repo_info(repo).private:
            raise RecipeError(f"--push-to-hub: {repo} exists and is public; add --public if that is meant")
        client.upload_folder(folder_path=str(folder), repo_id=repo, commit_message="Exported by remix")
    except RecipeError:
        raise
    except Exception as error:  # the hub's own, and whatever its client raises when the network fails
        reason = shortened(str(error))
        raise RecipeError(
            f"--push-to-hub: {repo}: {reason}; the folder {folder} is written, only not uploaded"
        ) from None
    return f"{constants.ENDPOINT}/{repo}"
