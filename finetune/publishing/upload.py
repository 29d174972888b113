"""A folder to the hub as one commit, through huggingface_hub. What is there already is not sent again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.errors import Failure, Fault

WAITS = (1, 4, 15)
"""Seconds before each further try after a dropped connection."""
DROPPED = ("TransportError", "ConnectionError", "Timeout", "TimeoutException", "TimeoutError")
"""Classes of errors that say so: huggingface_hub's versions stand on several HTTP libraries."""
LOGIN = (
    "Log in with `hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)."
)


def require_login() -> None:
    """Raises Fault where there is no token: it is taken from the environment or the hub's own store."""
    from huggingface_hub import get_token

    if not get_token():
        raise Fault(f"--yes: no access token for the hub. {LOGIN}")


def upload(folder: Path, files: Sequence[Path], repo: str, public: bool, say: Callable[[str], None]) -> str:
    """Send the files, and return what there is to say. Tries again when the connection drops.

    Raises Fault when the repository is public and that was not asked for, Failure when it cannot be done.
    """
    for wait in (*WAITS, None):
        try:
            return _send(folder, files, repo, public)
        except Fault:
            raise
        except Exception as error:
            if not _dropped(error):
                raise Failure(_explained(repo, error)) from error
            if wait is None:
                raise Failure(
                    f"{repo}: the connection to the hub was lost ({_line(error)}). The same command goes on: what has "
                    "arrived is not sent again."
                ) from error
            say(f"the connection was lost ({_line(error)}); trying again in {wait} s")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _send(folder: Path, files: Sequence[Path], repo: str, public: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="finetune")
    try:
        before = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public, exist_ok=True)
        before = api.model_info(repo)
    if not before.private and not public:
        raise Fault(f"{repo}: there is such a repository, and everyone can read it. Say --public, or name another.")
    # Made anew for each try: they ask the hub what is there, so that a commit whose answer was lost is not made twice.
    operations = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
    made = api.create_commit(repo, operations, commit_message="Publish with finetune")
    kept = " It stays private, as it was: its settings on the hub change that." if public and before.private else ""
    if made.oid == before.sha:
        return f"{repo} has all of it already.{kept}"
    return f"Published as one commit: {made.commit_url}{kept}"


def _dropped(error: BaseException | None) -> bool:
    """Whether the network, or a server out of breath, was the cause."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        named = {kind.__name__ for kind in type(error).__mro__}
        if (status in (429, 500, 502, 503, 504) or named & set(DROPPED)) and "OfflineModeIsEnabled" not in named:
            return True
        error = error.__cause__ or error.__context__
    return False


def _explained(repo: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if type(error).__name__ == "OfflineModeIsEnabled":
        return f"{repo}: HF_HUB_OFFLINE is set, so the hub is not asked. Unset it to publish."
    if status in (401, 403):
        return f"{repo}: the hub does not let you write there ({_line(error)}). {LOGIN}"
    return f"{repo}: the hub did not take it ({_line(error)})."


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
