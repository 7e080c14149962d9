"""Standard output and error of the command line, which may be closed, full or a pipe without a reader."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class GuardedStream:
    """A text stream whose failure to write ends no work: the rest goes to /dev/null and `failure` keeps the error.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write `text` and return the number of its characters."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._discard(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def writelines(self, lines: Iterator[str]) -> None:
        """Write several texts."""
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self, error: OSError) -> None:
        """Lead the stream to /dev/null, so that neither later output nor the interpreter's exit fails again."""
        self.failure = self.failure or error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


@contextlib.contextmanager
def guarded_streams() -> Iterator[GuardedStream]:
    """Guard standard output and error within the block and yield the former.

    A closed stream is replaced by /dev/null. Otherwise the next file that is opened would get its number, and what a C
    library prints would end up in that file.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115
    before = sys.stdout, sys.stderr
    output = GuardedStream(sys.stdout)
    sys.stdout, sys.stderr = output, GuardedStream(sys.stderr)
    try:
        yield output
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def describe_output_failure(output: GuardedStream) -> str:
    """Flush standard output and return what is missing of it; '' if nothing is, or if a reader such as `head` left."""
    output.flush()
    if output.failure is None or output.failure.errno == errno.EPIPE:
        return ""
    return f"standard output is incomplete ({output.failure.strerror}); files of this run were written all the same"
