"""Names of repositories on the hub: `hf:org/name`, `hf:org/name@revision`, and aliases of published weights."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from vitmodel.errors import UsageError
from vitmodel.hub.aliases import ALIASES

PREFIX = "hf:"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
FILE_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".onnx", ".json", ".zip")
"""Ends of texts that are paths of files, even where they look like the name of a repository."""


@dataclass(frozen=True)
class HubName:
    """A repository, and one of its revisions.

    Examples:
        >>> str(HubName.parse("hf:facebook/dinov2-small@main"))
        'hf:facebook/dinov2-small@main'
    """

    repository: str
    """Such as facebook/dinov2-small."""
    revision: str | None = None
    """A branch, a tag or a commit hash; None = the head of the main branch."""

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Return the repository that `hf:org/name` or `org/name`, with or without `@revision`, names.

        Raises:
            UsageError: `text` is not of this form.
        """
        repository, at, revision = text.removeprefix(PREFIX).partition("@")
        if not REPOSITORY.fullmatch(repository) or bool(at) != bool(revision) or ".." in text:
            raise UsageError(
                f"{text}: is not a name on the hub; write hf:organisation/name or hf:organisation/name@tag"
            )
        return cls(repository, revision or None)

    def at(self, commit: str) -> HubName:
        """Return the name of the same repository at a commit, whose files never change."""
        return replace(self, revision=commit)

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit hash, whose files never change."""
        return COMMIT.fullmatch(self.revision or "") is not None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def is_package_name(value: Path | str) -> bool:
    """Return whether `value` names a package on the hub. An existing path of the same name takes precedence."""
    return str(value).startswith(PREFIX) and not Path(value).exists()


def weights_name(value: Path | str) -> HubName | None:
    """Return the repository that a value of `--weights` names, or None if the value is a path.

    An existing path takes precedence over all names. `org/name` in an existing folder `org` is a path, too.

    Raises:
        UsageError: The value starts with `hf:` and is no name.
    """
    text = str(value)
    if Path(text).exists():
        return None
    if text.startswith(PREFIX):
        return HubName.parse(text)
    alias, _, revision = text.partition("@")
    if alias in ALIASES:
        return HubName(ALIASES[alias].repository, revision or None)
    if REPOSITORY.fullmatch(alias) and not text.endswith(FILE_SUFFIXES) and not Path(alias).parent.is_dir():
        return HubName.parse(text)
    return None


def check_weights_name(value: Path | str, option: str) -> None:
    """Raise UsageError, with the most similar aliases, if `value` is neither an existing path nor a name."""
    if Path(value).exists() or weights_name(value) is not None:
        return
    text = str(value)
    similar = difflib.get_close_matches(text, ALIASES, n=3, cutoff=0.6)
    meant = f"did you mean {' or '.join(similar)}? " if similar else ""
    on_hub = f", or hf:{text} for a repository on the hub" if REPOSITORY.fullmatch(text.partition("@")[0]) else ""
    raise UsageError(
        f"{option}: {text} does not exist; {meant}"
        f"give the path of a file or folder, or a name that `vitmodel weights` lists{on_hub}"
    )
