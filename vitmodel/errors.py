"""Exceptions that vitmodel raises.

All of them derive from `VitmodelError`, so that one `except` clause catches every failure this package anticipates::

    VitmodelError
    ├── UsageError             a wrong argument, file or column
    ├── DivergedError          a training whose steps are not finite
    ├── RefusedError           an input that must not be scored
    │   ├── ImageRefusedError      a single image
    │   └── InputRefusedError      a file or folder that contains no image
    ├── RequestRefusedError    an HTTP request that is not answered
    ├── WorkerLostError        a worker process that died or timed out (internal)
    ├── DeflatedDataError      a DICOM data set that has to be inflated first (internal)
    ├── InvalidObjectError     a received DICOM object that cannot be stored (internal)
    ├── DiskFullError          less space than a node keeps free (internal)
    └── UnreachableError       a destination of a node's results that does not answer (internal)
"""

from __future__ import annotations


class VitmodelError(Exception):
    """Base class of all errors of this package.

    The message explains the failure to the user. The command line prints it without a traceback and exits with
    `status`.

    Attributes:
        status: Exit status of the command line.

    Examples:
        >>> try:
        ...     vitmodel.load("no/such/package")
        ... except vitmodel.VitmodelError as error:
        ...     print(type(error).__name__)
        UsageError
    """

    status = 1


class UsageError(VitmodelError):
    """Raised for a wrong argument, key, file or column, which the user can correct before trying again.

    Examples:
        >>> try:
        ...     vitmodel.load("run/package", devise="cpu")
        ... except vitmodel.UsageError as error:
        ...     print(error)
        devise: unknown option; did you mean device?
    """

    status = 2


class DivergedError(VitmodelError):
    """Raised when a training is stopped because too many steps had a loss or gradient that is not finite."""


class RefusedError(VitmodelError):
    """Base class of errors for an input that must not be used.

    Args:
        code: A reason code, one of the keys of `vitmodel.pixels.verdict.REFUSAL_REASONS`.
        message: The cause in this particular input.

    Attributes:
        code: The reason code.
        message: The cause.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)  # all arguments, so that worker processes can pickle it
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class ImageRefusedError(RefusedError):
    """Raised for an image that must not be used, such as one that is unreadable, blank or no mammogram."""

    @classmethod
    def of(cls, refusal: RefusedError) -> ImageRefusedError:
        """Return the refusal of an image with the code and message of another refusal, such as its archive's."""
        return cls(refusal.code, refusal.message)


class InputRefusedError(RefusedError):
    """Raised for a file or folder to be scored that contains no image, such as an encrypted zip."""


class RequestRefusedError(VitmodelError):
    """Raised for an HTTP request that is not answered.

    Args:
        http_status: Status code of the response (RFC 9110, section 15).
        message: The cause and how to fix it.

    Attributes:
        http_status: Status code of the response.
        message: The cause and how to fix it.
    """

    def __init__(self, http_status: int, message: str) -> None:
        super().__init__(http_status, message)
        self.http_status = http_status
        self.message = message

    def __str__(self) -> str:
        return self.message


class WorkerLostError(VitmodelError):
    """Raised inside a worker pool if the process of an item died or exceeded the time limit.

    The item then gets a substitute result.
    """


class DeflatedDataError(VitmodelError):
    """Raised inside the DICOM reader if the rest of the data set is deflated.

    The reader inflates it and starts again.
    """


class InvalidObjectError(VitmodelError):
    """Raised for a received DICOM object that cannot be stored; the message names no value of its header."""


class DiskFullError(VitmodelError):
    """Raised if less space is left on the disk than the node keeps free."""


class UnreachableError(VitmodelError):
    """Raised if a PACS does not answer; it is no fault of what is sent to it or asked for."""
