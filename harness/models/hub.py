"""The hub: from a name and a revision to a commit, and from a commit to files on this disk.

A revision such as ``main`` moves. It is looked up once, when a sweep is planned; everything after that, the
content key included, goes by the commit. Where the hub cannot be reached, what is in its local cache is used
at the commit that the cache knows for the revision.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.errors import ConfigError
from harness.folders import replacing
from harness.models.checkpoint import CONTENT_SUFFIXES, PICKLE_ADVICE, weight_candidates
from harness.models.hub_client import HubUnavailable, use_bounded_client

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HubLookup", "NotOnHub", "fetch_description", "fetch_weights", "remember", "resolve_commit"]

log = logging.getLogger("harness.models")

Kind = Literal["model", "dataset"]
LOOKUP_TIMEOUT_S = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLES = (".bin", ".pt")
_WEIGHTS = (".safetensors", *_PICKLES)


class NotOnHub(ConfigError):
    """The hub does not have it or show it to this user, or can neither be asked nor is it in the cache."""


@dataclass
class HubLookup:
    """Asks the hub for commits; once it has been silent, `silence` says why and only the cache is asked."""

    silence: str | None = None

    def commit(self, name: str, revision: str | None, kind: Kind = "model") -> str:
        """The commit that a revision (by default ``main``) stands for now.

        Raises:
            NotOnHub: see there.
        """
        what = f"{'data set' if kind == 'dataset' else 'model'} {name!r}"
        if revision is not None and _COMMIT.fullmatch(revision) and _snapshot(name, revision, kind):
            return revision  # a commit never moves: nothing to ask
        if self.silence is None:
            try:
                return _ask(name, revision, kind, what)
            except HubUnavailable as error:
                self.silence = str(error)
        return _cached_commit(name, revision, kind, what, self.silence)


def resolve_commit(name: str, revision: str | None, kind: Kind = "model") -> str:
    """As `HubLookup.commit`, of a single repository."""
    return HubLookup().commit(name, revision, kind)


def _ask(name: str, revision: str | None, kind: Kind, what: str) -> str:
    """The hub's answer.

    Raises:
        HubUnavailable: there is none.
        NotOnHub: it is a refusal, or makes no sense.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    use_bounded_client()
    api = HfApi()
    look_up: Callable[..., object] = api.model_info if kind == "model" else api.dataset_info
    try:
        found = getattr(look_up(name, revision=revision, timeout=LOOKUP_TIMEOUT_S), "sha", None)
    except OfflineModeIsEnabled:
        raise HubUnavailable("HF_HUB_OFFLINE is set") from None
    except GatedRepoError:
        raise NotOnHub(
            f"{what} is gated: accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise NotOnHub(
            f"{what} is not on the hub, or is private: check the name; for a private one log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise NotOnHub(f"{what} has no branch, tag or commit {revision!r}") from None
    except HfHubHTTPError as error:
        raise NotOnHub(
            f"{what}: the hub answers {error.response.status_code} to the request for it"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise NotOnHub(f"{what}: the hub's answer cannot be read ({type(error).__name__}: {error})") from None
    # The commit becomes the name of a folder in the cache.
    if not (isinstance(found, str) and _COMMIT.fullmatch(found)):
        raise NotOnHub(f"{what}: the hub names no commit for it")
    return found


def fetch_description(name: str, commit: str, *, trust_remote_code: bool) -> Path:
    """Download all of a model but its weights; returns the folder.

    Raises:
        NotOnHub: it has no config.json, its files cannot be listed, or the download broke.
    """
    is_known = _snapshot(name, commit, "model") is not None
    folder = _fetch(name, commit, "config.json")
    if folder is None:
        raise NotOnHub(f"model {name!r} is no checkpoint in Hugging Face format: it has no config.json")
    wanted = [suffix for suffix in CONTENT_SUFFIXES if suffix not in _WEIGHTS]
    if not trust_remote_code:
        wanted.remove(".py")
    for file in _listed(name, commit, or_cached=is_known):
        if "/" not in file and file.endswith(tuple(wanted)):
            _fetch(name, commit, file)
    return folder


def fetch_weights(name: str, commit: str, *, allow_pickle: bool) -> Path:
    """Download the weights of a described model; returns the folder with everything.

    A file appears in the folder only when it is whole; what is there is not downloaded again.

    Raises:
        NotOnHub: there are none that may be loaded, or the download broke.
    """
    from huggingface_hub import is_offline_mode

    folder = _snapshot(name, commit, "model")
    if folder is None:
        raise NotOnHub(f"model {name!r} at {commit[:12]} is not in the local cache")
    candidates = weight_candidates(folder, allow_pickle=allow_pickle)
    if any(all((folder / file).is_file() for file in files) for files in candidates):
        return folder
    if is_offline_mode():
        raise NotOnHub(
            f"the weights of model {name!r} at {commit[:12]} are not all in the local cache, and "
            "HF_HUB_OFFLINE is set"
        )
    for files in candidates:
        if all(_fetch(name, commit, file) is not None for file in files):
            return folder
    others = [file for file in _listed(name, commit) if "/" not in file and file.endswith(_PICKLES)]
    advice = f"; {PICKLE_ADVICE}" if others and not allow_pickle else ""
    raise NotOnHub(f"model {name!r} at {commit[:12]} has no model.safetensors{advice}")


# --- the local cache ---------------------------------------------------------------------------------


def _snapshot(name: str, commit: str, kind: Kind) -> Path | None:
    """The folder of a commit in the cache, if there is one."""
    folder = _repository(name, kind) / "snapshots" / commit
    return folder if folder.is_dir() else None


def remember(name: str, revision: str | None, kind: Kind, commit: str) -> None:
    """Note in the cache what a revision stands for, as the hub's library does: for the time without a hub."""
    if revision == commit:
        return
    note = _repository(name, kind) / "refs" / (revision or "main")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note) as file:  # who reads it meanwhile finds the old commit or the new one
            file.write(commit.encode("ascii"))
    except OSError as error:  # a cache that cannot be written can still be read
        log.debug("%s: %s", note, error)


def _repository(name: str, kind: Kind) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)


def _cached_commit(name: str, revision: str | None, kind: Kind, what: str, problem: str) -> str:
    """The commit that the cache knows for a revision."""
    if revision is not None and _COMMIT.fullmatch(revision) and kind == "dataset":
        return revision
    try:
        note = _repository(name, kind) / "refs" / (revision or "main")
        commit = note.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = ""
    if not _COMMIT.fullmatch(commit):
        raise NotOnHub(f"{what} is not in the local cache, and the hub cannot be asked: {problem}")
    log.warning("%s is taken from the local cache at commit %s: %s", what, commit[:12], problem)
    return commit


def _listed(name: str, commit: str, *, or_cached: bool = True) -> list[str]:
    """The files of a commit: the hub's list, or what is in the cache.

    Args:
        or_cached: the cache may answer; not where it holds only what was downloaded just now.

    Raises:
        NotOnHub: neither tells.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    use_bounded_client()
    try:
        info = HfApi().model_info(name, revision=commit, timeout=LOOKUP_TIMEOUT_S)
        return sorted(sibling.rfilename for sibling in info.siblings or ())
    except (HubUnavailable, OfflineModeIsEnabled, HfHubHTTPError, KeyError, TypeError, ValueError) as error:
        if not or_cached:
            # Without its tokenizer's files it would be another model under the same commit.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise NotOnHub(f"model {name!r}: the hub does not list its files ({reason})") from None
        folder = _snapshot(name, commit, "model")
        return _names(folder.iterdir()) if folder is not None else []


def _names(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name for path in paths)


def _fetch(name: str, commit: str, file: str) -> Path | None:
    """Download one file unless it is in the cache; returns its folder, None where there is no such file."""
    cached = _snapshot(name, commit, "model")
    if cached is not None and (cached / file).is_file():
        return cached
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # they would fill a log
    use_bounded_client()
    what = f"model {name!r}: {file}"
    try:
        return Path(HfApi().hf_hub_download(name, file, revision=commit)).parent
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, OfflineModeIsEnabled):
            return None
        # The hub has it, or cannot say: without it, it would be another model under the same commit.
        reason = ""
        if isinstance(error.__cause__, HfHubHTTPError):
            reason = f": the hub answers {error.__cause__.response.status_code}"
        raise NotOnHub(f"{what} cannot be downloaded and is not in the local cache{reason}") from None
    except EntryNotFoundError:
        return None
    except OfflineModeIsEnabled:
        return None
    except HubUnavailable as error:
        raise NotOnHub(f"{what} cannot be downloaded: {error}") from None
    except HfHubHTTPError as error:
        raise NotOnHub(f"{what} cannot be downloaded: the hub answers {error.response.status_code}") from None
    except (httpx.HTTPError, OSError) as error:
        # The connection broke, or a disk is full; what has come so far is kept for the next attempt.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise NotOnHub(
            f"{what}: the download broke off ({reason}); run the same command again to go on"
        ) from None
