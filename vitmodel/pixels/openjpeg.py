"""Decode JPEG 2000 at a reduced resolution through the C interface of OpenJPEG.

No Python package offers OpenJPEG's `cp_reduce` for 16-bit images of every size. The wheel of imagecodecs, which this
project needs anyway, contains the shared library, and its C interface has been stable since version 2.1 (2014). The
structures below are the leading members of those in openjpeg.h. ctypes releases the interpreter lock while the library
decodes.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

RAW_CODESTREAM = 0
JP2_FILE = 2
"""Values of opj_codec_format."""
END_OF_STREAM = c_size_t(-1).value

ReadFunction = ctypes.CFUNCTYPE(c_size_t, c_void_p, c_size_t, c_void_p)
SkipFunction = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, c_void_p)
SeekFunction = ctypes.CFUNCTYPE(c_int, ctypes.c_int64, c_void_p)


class OpjParameters(ctypes.Structure):
    """The first members of opj_dparameters_t, and room for the others, which the library fills in."""

    _fields_ = (("reduce", c_uint32), ("layers", c_uint32), ("rest", ctypes.c_byte * 16384))


class OpjComponent(ctypes.Structure):
    """The structure opj_image_comp_t."""

    _fields_ = (
        *(
            (name, c_uint32)
            for name in ("dx", "dy", "w", "h", "x0", "y0", "prec", "bpp", "sgnd", "resno_decoded", "factor")
        ),
        ("data", POINTER(c_int32)),
        ("alpha", c_uint16),
    )


class OpjImage(ctypes.Structure):
    """The structure opj_image_t."""

    _fields_ = (
        *((name, c_uint32) for name in ("x0", "y0", "x1", "y1", "numcomps")),
        ("color_space", c_int),
        ("comps", POINTER(OpjComponent)),
        ("icc_profile_buf", c_void_p),
        ("icc_profile_len", c_uint32),
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Return libopenjp2 from the wheel of imagecodecs or from the system; None if neither has it."""
    import imagecodecs

    package = Path(imagecodecs.__file__).parent
    bundled = [*(package.parent / "imagecodecs.libs").glob("*openjp2*"), *(package / ".dylibs").glob("*openjp2*")]
    for name in [*map(str, bundled), ctypes.util.find_library("openjp2")]:
        if name:
            try:
                return declare_signatures(ctypes.CDLL(name))
            except (OSError, AttributeError):  # built for another machine, or too old to have all functions
                continue
    return None


def declare_signatures(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Return `lib` with the argument and result types of the functions used here.

    Raises:
        AttributeError: The library lacks a function.
    """
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "opj_version": (c_char_p, []),
        "opj_create_decompress": (c_void_p, [c_int]),
        "opj_destroy_codec": (None, [c_void_p]),
        "opj_set_default_decoder_parameters": (None, [POINTER(OpjParameters)]),
        "opj_setup_decoder": (c_int, [c_void_p, POINTER(OpjParameters)]),
        "opj_decoder_set_strict_mode": (c_int, [c_void_p, c_int]),
        "opj_stream_create": (c_void_p, [c_size_t, c_int]),
        "opj_stream_destroy": (None, [c_void_p]),
        "opj_stream_set_read_function": (None, [c_void_p, ReadFunction]),
        "opj_stream_set_skip_function": (None, [c_void_p, SkipFunction]),
        "opj_stream_set_seek_function": (None, [c_void_p, SeekFunction]),
        "opj_stream_set_user_data_length": (None, [c_void_p, c_uint64]),
        "opj_read_header": (c_int, [c_void_p, c_void_p, POINTER(POINTER(OpjImage))]),
        "opj_decode": (c_int, [c_void_p, c_void_p, POINTER(OpjImage)]),
        "opj_end_decompress": (c_int, [c_void_p, c_void_p]),
        "opj_image_destroy": (None, [POINTER(OpjImage)]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def library_version() -> str:
    """Return the version of the library that was found, '' if there is none."""
    lib = load_library()
    return lib.opj_version().decode() if lib else ""


def stream_callbacks(data: bytes) -> tuple[Any, Any, Any]:
    """Return the functions with which OpenJPEG reads, skips and seeks in `data`.

    They must be kept alive while the library holds their addresses. They are closures, not methods of an object that
    also stores them: such a reference cycle would keep `data` in memory until the next garbage collection.
    """
    position = 0
    start = np.frombuffer(data, np.uint8).ctypes.data

    def read(buffer: int, size: int, _: Any) -> int:
        nonlocal position
        size = min(size, len(data) - position)
        if size <= 0:
            return END_OF_STREAM
        ctypes.memmove(buffer, start + position, size)
        position += size
        return size

    def skip(size: int, _: Any) -> int:
        nonlocal position
        position += max(size, 0)  # OpenJPEG recognises a truncated stream by skipping past its end
        return size

    def seek(offset: int, _: Any) -> int:
        nonlocal position
        position = min(max(offset, 0), len(data))
        return position == offset

    return ReadFunction(read), SkipFunction(skip), SeekFunction(seek)


def decode(data: bytes, reduce: int = 0) -> np.ndarray:
    """Return the only component of a JPEG 2000 codestream or JP2 file.

    Decoding is strict: a truncated stream is an error, not half an image.

    Args:
        data: The codestream or file.
        reduce: Number of the finest resolution levels to skip.

    Returns:
        Pixels `(H, W)`. The type is the smallest of 8, 16 or 32 bits that holds the precision of the codestream, with
        its sign.

    Raises:
        ValueError: The stream is damaged, cut short, has fewer levels or has several components.
        RuntimeError: OpenJPEG is not installed.
    """
    lib = load_library()
    if lib is None:
        raise RuntimeError("the OpenJPEG library was not found; install imagecodecs or libopenjp2")
    read, skip, seek = stream_callbacks(data)
    codec = lib.opj_create_decompress(RAW_CODESTREAM if data.startswith(b"\xff\x4f") else JP2_FILE)
    stream = lib.opj_stream_create(1 << 20, 1)
    image = POINTER(OpjImage)()
    try:
        lib.opj_stream_set_read_function(stream, read)
        lib.opj_stream_set_skip_function(stream, skip)
        lib.opj_stream_set_seek_function(stream, seek)
        lib.opj_stream_set_user_data_length(stream, len(data))
        parameters = OpjParameters()
        lib.opj_set_default_decoder_parameters(byref(parameters))
        parameters.reduce = reduce
        if not (lib.opj_setup_decoder(codec, byref(parameters)) and lib.opj_decoder_set_strict_mode(codec, 1)):
            raise ValueError("OpenJPEG cannot be set up")
        if not lib.opj_read_header(stream, codec, byref(image)):
            raise ValueError("OpenJPEG cannot read the header of the codestream")
        if image.contents.numcomps != 1:
            raise ValueError(f"the codestream has {image.contents.numcomps} components instead of one")
        if not (lib.opj_decode(codec, stream, image) and lib.opj_end_decompress(codec, stream)):
            raise ValueError("OpenJPEG cannot decode the codestream: it is damaged or cut short")
        return _component_pixels(image.contents.comps[0])
    finally:
        if image:
            lib.opj_image_destroy(image)
        lib.opj_stream_destroy(stream)
        lib.opj_destroy_codec(codec)


def _component_pixels(component: OpjComponent) -> np.ndarray:
    """Return a copy of the pixels of a decoded component, `(H, W)`."""
    if not component.data:
        raise ValueError("OpenJPEG found no pixels in the codestream")
    pixels = np.ctypeslib.as_array(component.data, (component.h, component.w))
    kind = "i" if component.sgnd else "u"
    if component.prec <= 8:
        return pixels.astype(f"{kind}1")
    return pixels.astype(f"{kind}2" if component.prec <= 16 else f"{kind}4")
