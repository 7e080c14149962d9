"""The command `push`: upload a model package to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitmodel.config import PushConfig
from vitmodel.errors import UsageError
from vitmodel.hub.aliases import ALIASES
from vitmodel.hub.client import endpoint, upload
from vitmodel.hub.names import PREFIX, HubName
from vitmodel.model.package import read_config, verify_package
from vitmodel.model.package_check import CARD_FILE
from vitmodel.model.package_file import package_files
from vitmodel.model.shared_package import check_shared_folder
from vitmodel.reports.hub_card import hub_card


def push(config: PushConfig) -> None:
    """Upload the package, and print its name at the new commit.

    Raises:
        UsageError: PACKAGE is no package, NAME is no repository, access is denied, or the repository is public and
            `public` is off.
        VitmodelError: The upload failed. The repository is unchanged.
    """
    name = repository_of(config.name)
    check_shared_folder(config.package)
    verify_package(config.package)
    package = read_config(config.package)[2]
    files = package_files(config.package)
    for path in files:
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    warn_of_licence(package, config)
    card = hub_card(name.repository, (config.package / CARD_FILE).read_text(encoding="utf-8"), package, config.licence)
    contents: dict[str, Path | bytes] = {path.name: path for path in files}
    commit = upload(name, contents | {"README.md": card.encode()}, public=config.public, message=config.message)
    print(f"{name.at(commit)}\n{endpoint()}/{name.repository}")


def repository_of(text: str) -> HubName:
    """Return the repository to upload to. Raises UsageError if `text` is a path or names a revision."""
    if not text.startswith(PREFIX) or "@" in text:
        raise UsageError(
            f"name: {text} is not the name of a repository; write hf:organisation/name, without revision, because the "
            "package becomes the head of `main`"
        )
    return HubName.parse(text)


def warn_of_licence(package: dict[str, Any], config: PushConfig) -> None:
    """Print the licence of the weights that the training started from. Raises UsageError if it forbids the new one."""
    repository = str(package.get("weights", {}).get("name", "")).removeprefix(PREFIX)
    alias = next((alias for alias in ALIASES.values() if alias.repository == repository), None)
    if alias is None:
        return
    print(f"started from {repository}, whose licence is {alias.licence}")
    if "-nc-" in alias.licence and "-nc-" not in config.licence and config.licence not in ("unknown", "other"):
        raise UsageError(
            f"licence: {config.licence} allows commercial use, but {repository}, from which the training started, has "
            f"{alias.licence}; choose a licence that forbids it"
        )
