"""The commands of `vitmodel`, one module per verb. A command never imports another command."""

from __future__ import annotations
