"""Uploads a folder to a repository on the hub."""

import shlex
from pathlib import Path
from typing import cast

from tunekit.errors import InputError, ResourceError
from tunekit.model.transformers_guard import quiet
from tunekit.recipe.bases.paths import is_like_path

LENGTH = 300  # characters of the hub's answer that a message quotes


def upload_folder(folder: Path, name: str) -> str:
    """Upload the folder to the hub repository `name` or NAMESPACE/name. A new repository is made private. Returns its
    address.

    If an upload is interrupted, the error contains a command that resumes it. The hub skips files that it already has.
    Raises: InputError without permission; ResourceError if the network fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    failed = cast(type[Exception], HfHubHTTPError.__mro__[1])  # the base class of this error and of connection errors

    command = f"hf upload --private {name} {shlex.quote(str(folder))}"
    api, again = HfApi(), f"the folder is complete; upload it with: {command}"
    try:
        with quiet():
            address = api.create_repo(name, private=True, exist_ok=True)
            api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Upload from tunekit")
    except (LocalTokenNotFoundError, HFValidationError, failed, OSError, RuntimeError) as raised:
        error = raised.__cause__ or raised  # if a file's upload fails, a RuntimeError names only the file
        what = f"the upload did not finish: {' '.join(str(error).split())[:LENGTH]}"
        if not isinstance(error, HfHubHTTPError) and isinstance(error, failed | ConnectionError | TimeoutError):
            what = f"the hub cannot be reached: {' '.join(str(error).split())[:LENGTH]}"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError | HFValidationError):
            raise InputError(what, f"log in with: hf auth login; {again}") from error
        raise ResourceError(what, again) from error
    return str(address)


def hub_name(name: str) -> str | None:
    """The base's name, if it is a name on the hub; None for a base that is only on this machine."""
    is_local = is_like_path(name) or Path(name).is_absolute() or name.endswith(".gguf") or ":" in name
    return None if is_local else name
