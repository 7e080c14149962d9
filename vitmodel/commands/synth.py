"""The command `synth`: write a synthetic mammography release."""

from __future__ import annotations

from vitmodel.config import SynthConfig
from vitmodel.phantoms.release import write_release


def synth(config: SynthConfig) -> None:
    """Write the release that `config` describes to `config.out`."""
    write_release(config)
