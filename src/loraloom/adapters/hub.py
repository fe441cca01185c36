"""Adapters on the Hugging Face hub: fetched at one commit into the hub's own cache, and told by their place in it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from loraloom.errors import LoraloomError, first_line

_WORD = r"[A-Za-z0-9_][\w.+=-]*"
_ON_HUB = re.compile(rf"({_WORD}/{_WORD})((?:/{_WORD})*)(?:@([\w./-]+))?", re.ASCII)
_CACHED = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(?:/(.+))?")
_STATE = ("optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "*.gguf")  # large, and never read
_CONFIG = "adapter_config.json"
_FILE = ".safetensors"  # what one that is no folder ends in
_TIMEOUT = 10.0  # seconds for the first answer


def adapter_folder(place: str | Path) -> Path:
    """Return the local folder of an adapter: a folder as it is given, or else a snapshot of the hub's.

    place: a folder, which wins where there is one; or `org/name` on the hub, `org/name/folder` where the repository
      holds several, each with `@revision` after it: a branch, a tag or a commit. Anything else comes back as it is.

    One commit is fetched whole, into the hub's cache; where the hub cannot be reached, what the cache has is taken.

    Raises LoraloomError where the hub cannot be reached or has no such adapter, with what to do.
    """
    match = _ON_HUB.fullmatch(str(place))
    if match is None or Path(place).exists() or str(place).endswith(_FILE):
        return Path(place)
    return _fetched(str(place), match[1], match[2].strip("/"), match[3])


def pinned(folder: Path) -> str | None:
    """Return the name, with its commit, of what a snapshot in the hub's cache holds; None of any other folder."""
    match = _CACHED.search(folder.resolve().as_posix())
    return f"{'/'.join(_hub_parts(match))}@{match[3]}" if match else None


def place_parts(folder: Path) -> tuple[str, ...]:
    """Return the parts of the absolute path of a folder or file; of a snapshot of the hub's, of its name there."""
    match = _CACHED.search(folder.resolve().as_posix())
    if match:
        return _hub_parts(match)
    place = folder.resolve()
    return (*place.parts[1:-1], place.name.removesuffix(_FILE))


def folder_name(folder: Path) -> str:
    """Return what a folder or file is called; of a snapshot in the hub's cache, what it is called there."""
    return "".join(place_parts(folder)[-1:])


def _hub_parts(match: re.Match[str]) -> tuple[str, ...]:
    return match[1], match[2], *filter(None, (match[4] or "").split("/"))


def _fetched(place: str, repository: str, inner: str, revision: str | None) -> Path:
    """Return the folder `inner` of a snapshot, fetched where it is not in the cache."""
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    below = f"{inner}/" if inner else ""
    wanted: dict[str, Any] = {
        "allow_patterns": [f"{below}*"],
        "ignore_patterns": [f"{below}*/*", *(below + one for one in _STATE)],
    }
    # of httpx, or of what newer versions of the hub's library have in its place
    unreachable: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        found = HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT)
    except HFValidationError as error:
        raise LoraloomError(f"{place}: no such folder, and no name on the hub: {first_line(error)}") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, unreachable) as error:
        if _is_answer(error):
            raise _fault(place, repository, revision, error) from error
        try:
            snapshot = snapshot_download(repository, revision=revision, local_files_only=True, **wanted)
        except OSError:
            raise _fault(place, repository, revision, error) from error
        warnings.warn(f"{place}: the hub cannot be reached; what its cache holds is taken", stacklevel=2)
        return Path(snapshot, inner)
    files = {one.rfilename for one in found.siblings or ()}
    if below + _CONFIG not in files:
        others = sorted(name.removesuffix(f"/{_CONFIG}") for name in files if name.endswith(f"/{_CONFIG}"))
        near = f"name one of its folders: {repository}/{others[0]}" if others else "name an adapter's repository"
        raise LoraloomError(f"{place}: is on the hub, and no adapter: {below}{_CONFIG} is missing", near)
    if not isinstance(try_to_load_from_cache(repository, below + _CONFIG, revision=found.sha), str):
        warnings.warn(f"fetching {place} from the hub, at {(found.sha or '')[:12]}", stacklevel=2)
    try:
        return Path(snapshot_download(repository, revision=revision, **wanted), inner)
    except (OSError, unreachable) as error:
        raise _fault(place, repository, revision, error) from error


def _is_answer(error: Exception) -> bool:
    """Tell whether the hub answered, that it has no such thing or does not give it; else it was not reached."""
    status = getattr(getattr(error, "response", None), "status_code", 500)
    return bool(status < 500)


def _fault(place: str, repository: str, revision: str | None, error: Exception) -> LoraloomError:
    """Return what to tell of an adapter that could not be fetched."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return LoraloomError(
            f"{place}: {repository} is gated on the hub", "ask for access on its page there, then `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return LoraloomError(
            f"{place}: no such folder, and the hub has no such repository, or a private one",
            "name an adapter's folder, or org/name on the hub; for a private one first `hf auth login`",
        )
    if isinstance(error, RevisionNotFoundError):
        return LoraloomError(
            f"{place}: {repository} has no revision {revision}", "name a branch, a tag or a whole commit of it"
        )
    fetch = f"hf download {repository}{f' --revision {revision}' if revision else ''} --local-dir FOLDER"
    return LoraloomError(
        f"{place}: no such folder, and the hub cannot be reached ({first_line(error)[:120]})",
        f"where there is a connection run `{fetch}`, and name that folder here",
    )
