"""Read PGM, the greyscale format of Netpbm: P5 (binary) and P2 (text), of 8 or 16 bits."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

HEADER = re.compile(rb"P([25])" + 3 * rb"(?:\s|#[^\n\r]*[\n\r])+(\d{1,9})" + rb"(?:#[^\n\r]*)?\s", re.DOTALL)
"""Magic number, width, height and greatest value, with comments between them, and one white space (Netpbm, pgm)."""
MAX_HEADER_BYTES = 1 << 16
"""Bytes in which the header must end; comments can make it longer than its four numbers."""


class PgmHeader(NamedTuple):
    """The header of a PGM file."""

    rows: int
    columns: int
    maximum: int
    """The value that is shown white."""
    binary: bool
    size: int
    """Number of bytes of the header."""


def read_pgm_header(start: bytes) -> PgmHeader:
    """Return the header from the first bytes of a PGM file.

    Raises:
        ValueError: The header is damaged, or states an impossible greatest value.
    """
    match = HEADER.match(start[:MAX_HEADER_BYTES])
    if match is None:
        raise ValueError("the header of the PGM file is damaged")
    columns, rows, maximum = (int(number) for number in match.groups()[1:])
    if not 1 <= maximum <= 65535 or min(rows, columns) < 1:
        raise ValueError(f"the PGM file states {rows} x {columns} pixels with values up to {maximum}")
    return PgmHeader(rows, columns, maximum, match[1] == b"5", match.end())


def decode_pgm(content: bytes) -> np.ndarray:
    """Return the pixels of a PGM file as uint8 or uint16 `(H, W)`.

    Raises:
        ValueError: The file is damaged, cut short, or contains several pictures.
    """
    header = read_pgm_header(content)
    count = header.rows * header.columns
    dtype = np.dtype("u1" if header.maximum < 256 else ">u2")
    body = content[header.size :]
    if header.binary:
        if len(body) < count * dtype.itemsize:
            raise ValueError(f"the file is cut short: it has {len(body)} of {count * dtype.itemsize} bytes of pixels")
        if body[count * dtype.itemsize :].lstrip().startswith(b"P5"):
            raise ValueError("the file contains several pictures; split it")
        values = np.frombuffer(body, dtype, count)
    else:
        numbers = body.split()
        if len(numbers) < count:
            raise ValueError(f"the file is cut short: it has {len(numbers)} of {count} pixels")
        values = np.array(numbers[:count], np.uint32)
    if values.max() > header.maximum:
        raise ValueError(f"a pixel has the value {values.max()}, more than the {header.maximum} that the header states")
    return values.astype(dtype.newbyteorder("=")).reshape(header.rows, header.columns)
