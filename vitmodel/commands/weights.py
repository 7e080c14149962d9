"""The command `weights`: list published weights by name, or download them into the cache."""

from __future__ import annotations

from vitmodel.config import WeightsConfig
from vitmodel.errors import UsageError
from vitmodel.hub.aliases import ALIASES
from vitmodel.hub.client import cached_commit
from vitmodel.hub.names import HubName, weights_name
from vitmodel.utils import text_table


def weights(config: WeightsConfig) -> None:
    """Print the table of aliases, or download the weights that `config` names.

    Raises:
        UsageError: A name is unknown or is that of a local path.
        VitmodelError: A download failed.
    """
    if config.download:
        for value in config.download:
            print(download(value))
    else:
        print(list_aliases())


def download(value: str) -> str:
    """Download weights and return a line that says where they are, and which preset they fit."""
    from vitmodel.model.pretrained import preset_of
    from vitmodel.model.weight_source import find_weights, weights_source
    from vitmodel.model.weights import load_weights

    path, name = find_weights(value, "download")
    if name is None:
        raise UsageError(f"download: {value} exists on this machine; name it with --weights")
    return f"{weights_source(path, name)}\n{path}, for --model {preset_of(load_weights(path))}"


def list_aliases() -> str:
    """Return the table of aliases, with the state of the cache."""
    rows: list[tuple[str, ...]] = [("name", "repository", "--model", "MB", "licence", "arXiv", "cached")]
    for name, alias in ALIASES.items():
        rows.append((name, *map(str, alias), _state(name)))
    return "\n".join(
        [
            text_table(rows),
            "",
            "--weights takes these names and any other repository of a Vision Transformer, such as org/name or "
            "hf:org/name@revision.",
            "A file or folder of the same name takes precedence.",
        ]
    )


def _state(alias: str) -> str:
    """Return which commit of an alias the cache holds; "?" without the extra `hub`."""
    name = weights_name(alias) or HubName(ALIASES[alias].repository)
    try:
        commit = cached_commit(name)
    except UsageError:
        return "?"
    return commit[:12] if commit else "no"
