"""Run a verb of the command line as one step of a longer chain, such as `vitmodel versions`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from vitmodel.errors import VitmodelError

ROOT = Path(__file__).resolve().parents[2]


def run_step(*arguments: object) -> None:
    """Print `$ vitmodel ARGUMENTS` and run it in a process of its own, whose output goes to the terminal.

    A separate process is needed because a training may start further processes, which repeat the command line that
    started them, and because its memory is freed when it ends.

    Args:
        arguments: The verb and its arguments; they are converted to text.

    Raises:
        VitmodelError: The command fails.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ vitmodel {shlex.join(words)}", flush=True)
    # A checkout need not be installed. With -P no file in the working directory is mistaken for a library.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "vitmodel.cli", *words]
    process = subprocess.run(command, env=os.environ | {"PYTHONPATH": path})
    if process.returncode:
        raise VitmodelError(
            f"`vitmodel {shlex.join(words)}` failed with exit status {process.returncode}; "
            "correct the error that it printed and run the same command again"
        )
