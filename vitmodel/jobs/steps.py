"""A verb as one step of a longer chain, such as `vitmodel versions` is. Knows the command line and no stage."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from vitmodel.errors import VitmodelError

ROOT = Path(__file__).resolve().parents[2]


def run_step(*arguments: object) -> None:
    """Run `vitmodel ARGUMENTS`, say so, and let it speak for itself.

    In a process of its own: a training may start others to share its work, which repeat the command line that they come from, and what
    it holds in memory ends with it. Raises VitmodelError where it fails.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ vitmodel {shlex.join(words)}", flush=True)
    # A checkout need not be installed, and by -P no file of the folder at hand is taken for a library.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-P", "-m", "vitmodel.cli", *words], env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        raise VitmodelError(f"`vitmodel {shlex.join(words)}` ended with status {done.returncode}")
