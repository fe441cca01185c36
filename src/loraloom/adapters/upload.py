"""A folder's files put on the Hugging Face hub in one commit, by the hub's own library; and its refusals in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraloom.errors import LoraloomError, first_line

_PLACE = re.compile(r"([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Uploaded:
    """What the hub made of it: the commit, and the page that shows it."""

    commit: str
    url: str


def split_place(place: str) -> tuple[str, str | None]:
    """Return repository and branch of `org/name` or `org/name@branch`. Raises LoraloomError where it is neither."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    match = _PLACE.fullmatch(place)
    hint = "name a repository of yours: org/name, or org/name@branch"
    if match is None:
        raise LoraloomError(f"{place}: no name of a repository on the hub", hint)
    try:
        validate_repo_id(match[1])
    except HFValidationError as error:
        raise LoraloomError(f"{place}: no name of a repository on the hub: {first_line(error)}", hint) from error
    if match[2] and _COMMIT.fullmatch(match[2]):
        raise LoraloomError(f"{place}: a commit stays as it is", f"name a branch: {match[1]}@BRANCH")
    return match[1], match[2]


def upload(place: str, files: Mapping[str, Path | bytes], message: str, *, private: bool) -> Uploaded:
    """Commit files to a repository on the hub, which is made where it is not there; what else it holds stays.

    place: `org/name`, or `org/name@branch`, which is made too. files: by their names there, contents or where they lie.
    private: a repository that is made is, and one that is there must be, before anything is sent.

    Raises LoraloomError where the hub cannot be reached or does not take it, with what to do.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    repository, branch = split_place(place)
    unreachable: type[Exception] = HfHubHTTPError.__bases__[0]  # of the library below, whichever it is
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private or None, exist_ok=True)
        if private and not hub.model_info(repository).private:
            raise LoraloomError(
                f"{repository}: is there already, and everybody can read it",
                "make it private on its page, leave out --private, or name another repository",
            )
        if branch:
            hub.create_branch(repository, branch=branch, exist_ok=True)
        adding = [CommitOperationAdd(name, file) for name, file in sorted(files.items())]
        done = hub.create_commit(repository, adding, commit_message=message, revision=branch)
    except (HfHubHTTPError, OfflineModeIsEnabled, unreachable) as error:
        raise _fault(place, repository, error) from error
    return Uploaded(done.oid, done.commit_url)


def _fault(place: str, repository: str, error: Any) -> LoraloomError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = first_line(error)[:200]
    if status == 401:
        return LoraloomError(
            f"{place}: the hub does not know who you are", "run `hf auth login` with a token that writes"
        )
    if status == 403:
        return LoraloomError(
            f"{place}: your token may not write to {repository} ({said})",
            "run `hf auth login` with a token that writes there, or name a repository of yours",
        )
    if status is not None and status < 500:
        return LoraloomError(f"{place}: the hub does not take it: {said}", "mend that, and push again")
    return LoraloomError(
        f"{place}: the hub cannot be reached ({said[:120]})",
        "push again where there is a connection; a commit is whole or not",
    )
