"""Download files of a repository into the cache that all tools of the hub share, and explain what went wrong.

huggingface_hub does the work and reads its own settings: HF_HOME (place of the cache), HF_ENDPOINT (a mirror),
HF_HUB_OFFLINE, HF_TOKEN, and the proxies in HTTPS_PROXY.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.hub.aliases import ALIASES
from vitmodel.hub.names import HubName
from vitmodel.utils import import_extra, progress_shown, sha256_file

logger = logging.getLogger(__name__)

Choose = Callable[[Mapping[str, int]], list[str]]
"""Takes the files of a repository with their sizes in bytes, and returns those to download."""
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository at one commit, in the cache."""

    folder: Path
    commit: str
    files: tuple[str, ...]


def library(module: str = "") -> Any:
    """Return huggingface_hub or, of a name such as "errors", its module.

    Raises:
        UsageError: The extra `hub` is not installed.
    """
    return import_extra(f"huggingface_hub.{module}".rstrip("."), "hub", "names on the hub")


def download(name: HubName, choose: Choose, what: str) -> Snapshot:
    """Return the chosen files of a repository, downloaded unless the cache holds them.

    A dropped connection is resumed. Without a network, the files in the cache are used.

    Args:
        name: The repository and its revision.
        choose: Selects the files; raises an error if there are none.
        what: The kind of files in words, for messages, such as "weights".

    Raises:
        UsageError: The repository, the revision or the extra `hub` does not exist, or access is not granted.
        VitmodelError: The download failed or a file in the cache is damaged. Every message says what to do.
    """
    before = cached_commit(name)
    try:
        with _progress_bars():
            try:
                info = library().HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
            except Exception as error:
                if before is None or not _is_unreachable(error):
                    raise
                logger.info("%s: the hub cannot be reached; the copy in the cache is used", name)
                return _cached(name, before, choose)
            sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
            files = choose(sizes)
            _say(name, files, sizes, before, info.sha)
            folder = library().snapshot_download(name.repository, revision=name.revision, allow_patterns=files)
    except VitmodelError:
        raise
    except Exception as error:  # the library, its HTTP client and the disk raise exceptions of many classes
        raise explain(error, name, what) from error
    snapshot = Snapshot(Path(folder), Path(folder).name, tuple(files))
    _check_digests(snapshot)
    return snapshot


def _say(name: HubName, files: list[str], sizes: Mapping[str, int], before: str | None, commit: str) -> None:
    """Log what is downloaded, and whether the revision has moved since it was last used."""
    if before == commit:
        return
    if before is not None:
        logger.warning(
            "%s: the revision has moved from %s to %s; name hf:%s@%s to keep the earlier one",
            name, before[:12], commit[:12], name.repository, before,
        )  # fmt: skip
    megabytes = sum(sizes[file] for file in files) / 1e6
    logger.info("downloading %s (%.0f MB) into %s", name, megabytes, cache_folder())


def _cached(name: HubName, commit: str, choose: Choose) -> Snapshot:
    """Return the chosen ones of the files that the cache holds at `commit`."""
    folder = repository_folder(name) / "snapshots" / commit
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    snapshot = Snapshot(folder, commit, tuple(choose(sizes)))
    _check_digests(snapshot)
    return snapshot


def _check_digests(snapshot: Snapshot) -> None:
    """Raise VitmodelError if a large file is not the one on the hub; the cache names its content by its SHA-256."""
    for file in snapshot.files:
        path = snapshot.folder / file
        content = path.resolve()
        if SHA256.fullmatch(content.name) and sha256_file(content) != content.name:
            raise VitmodelError(f"{path}: is damaged in the cache; delete {content} and run the same command again")


def endpoint() -> str:
    """Return the address of the hub or of its mirror."""
    return str(library("constants").ENDPOINT)


def cache_folder() -> Path:
    """Return the folder of the shared cache."""
    return Path(library("constants").HF_HUB_CACHE)


def repository_folder(name: HubName) -> Path:
    """Return the folder of a repository in the shared cache."""
    return cache_folder() / f"models--{name.repository.replace('/', '--')}"


def cached_commit(name: HubName) -> str | None:
    """Return the commit of the cached files of a revision, or None if the cache has none."""
    folder = repository_folder(name)
    if name.is_pinned:
        commit = str(name.revision)
    else:
        reference = folder / "refs" / (name.revision or "main")
        if not reference.is_file():
            return None
        commit = reference.read_text().strip()
    files = folder / "snapshots" / commit
    return commit if files.is_dir() and any(files.iterdir()) else None


@contextlib.contextmanager
def _progress_bars() -> Iterator[None]:
    """Hide the library's progress bars within the block if ours are hidden."""
    switch = library("utils")
    if progress_shown() or switch.are_progress_bars_disabled():
        yield
        return
    switch.disable_progress_bars()
    try:
        yield
    finally:
        switch.enable_progress_bars()


def _is_unreachable(error: BaseException) -> bool:
    """Return whether the network is down, offline mode is on, or the hub has no time."""
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    return isinstance(error, _transport_error() | ConnectionError | TimeoutError | socket.gaierror)


def _transport_error() -> type[Exception]:
    """Return the base class of the HTTP client's errors; which client it is depends on the library's version."""
    base: type[Exception] = library("errors").HfHubHTTPError.__bases__[0]
    return base


def _status(error: BaseException) -> int | None:
    """Return the status of the HTTP answer that caused `error`, or None if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def explain(error: Exception, name: HubName, what: str) -> VitmodelError:
    """Return an error of the library as one sentence that says what to do.

    Args:
        error: What the library raised.
        name: The repository.
        what: The kind of files in words.
    """
    errors = library("errors")
    page = f"{endpoint()}/{name.repository}"
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, errors.GatedRepoError):
            return UsageError(
                f"{name}: access is not granted; accept the terms at {page}, then run `hf auth login` or set HF_TOKEN"
            )
        if isinstance(link, errors.RevisionNotFoundError):
            return UsageError(
                f"{name}: the repository has no revision {name.revision}; see {page}/tree/main, or leave @ out"
            )
        if isinstance(link, errors.RepositoryNotFoundError):
            return UsageError(
                f"{name}: there is no repository of this name, or it is private; {_did_you_mean(name)}check the name "
                f"at {page}, and for a private one run `hf auth login` or set HF_TOKEN"
            )
        if isinstance(link, errors.RemoteEntryNotFoundError):
            return VitmodelError(
                f"{name}: a file has been removed from the repository meanwhile; run the command again"
            )
        if _status(link) in (401, 403):
            return UsageError(f"{name}: access is denied; run `hf auth login` with a token that may do this")
        if _status(link) == 429:
            return VitmodelError(f"{name}: the hub limits the rate of requests; wait some minutes, or set HF_TOKEN")
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return _disk_full(name)
        if "Consistency check failed" in str(link):
            return VitmodelError(f"{name}: the download was cut short; run the same command again")
    if any(_is_unreachable(link) for link in chain):
        return UsageError(
            f"{name}: the hub cannot be reached ({endpoint()}); on a machine with a network run "
            f"`hf download {name.repository} --local-dir {Path(name.repository).name}`, copy this folder here, and "
            f"name it instead of the {what}"
        )
    first_line = str(error).strip().partition("\n")[0]
    return VitmodelError(f"{name}: {type(error).__name__}: {first_line}; correct this and run the same command again")


def _did_you_mean(name: HubName) -> str:
    repositories = [alias.repository for alias in ALIASES.values()]
    similar = difflib.get_close_matches(name.repository, repositories, n=1, cutoff=0.8)
    return f"did you mean {similar[0]}? " if similar else ""


def _disk_full(name: HubName) -> VitmodelError:
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 1e6
    return VitmodelError(
        f"{name}: the disk of the cache {folder} is full ({free:.0f} MB are free); free some space, or set HF_HOME to "
        "a folder on another disk"
    )


def upload(name: HubName, files: Mapping[str, Path | bytes], public: bool, message: str) -> str:
    """Make `files` the content of a repository, in one commit, and return the commit.

    Files of an earlier upload that are not among `files` are deleted from the head; earlier commits keep them.

    Args:
        name: The repository; it is made if it does not exist.
        files: Name of each file -> its path or its bytes.
        public: Whether a new repository is public, and whether an existing one may be.
        message: Description of the commit.

    Raises:
        UsageError: Access is denied, or the repository is public and `public` is off.
        VitmodelError: The upload failed. The repository is unchanged.
    """
    hub = library()
    try:
        with _progress_bars():
            api = hub.HfApi()
            api.create_repo(name.repository, private=not public, exist_ok=True)
            info = api.model_info(name.repository)
            if not (public or info.private):
                raise UsageError(
                    f"{name}: the repository is public, so that everyone could read the package; add --public, or make "
                    f"it private at {endpoint()}/{name.repository}/settings"
                )
            obsolete = {entry.rfilename for entry in info.siblings or []} - {*files, ".gitattributes"}
            operations = [
                *(
                    hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=content)
                    for file, content in files.items()
                ),
                *(hub.CommitOperationDelete(path_in_repo=file) for file in sorted(obsolete)),
            ]
            return str(api.create_commit(name.repository, operations, commit_message=message).oid)
    except VitmodelError:
        raise
    except Exception as error:
        if any(_is_unreachable(link) and _status(link) != 429 for link in _chain(error)):
            raise VitmodelError(
                f"{name}: the hub cannot be reached ({endpoint()}), and nothing was changed there; repeat the command "
                "with a network, or give the package away as one file of `vitmodel pack`"
            ) from error
        raise explain(error, name, "package") from error
