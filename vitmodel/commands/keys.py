"""The command `keys`: make an API key of a server."""

from __future__ import annotations

import sys

from vitmodel.config import KeysConfig
from vitmodel.web.keys import add_key


def make_key(config: KeysConfig) -> None:
    """Print a new key on standard output and append its hash to the file.

    Raises:
        UsageError: The file has a key of this name, or is not valid.
    """
    key = add_key(config.file, config.name, config.scopes)
    print(key)
    print(f"the key is shown only now; {config.file} holds its hash", file=sys.stderr)
