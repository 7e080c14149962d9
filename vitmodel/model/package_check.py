"""Check that a model package is what its writer wrote, before anything in it is used.

`config.json` holds under `integrity` the SHA-256 of every other file and a digest of itself: the SHA-256 of its
canonical JSON (RFC 8259, keys sorted, no spaces, ASCII, floats as Python's `repr`) without the field
`integrity.digest`. The digest therefore names the whole package. It detects damage and mistakes; against a forger who
also replaces the digest, sign it or compare it with the published one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.architecture import NetworkConfig
from vitmodel.model.network import Network
from vitmodel.model.package_schema import check_document
from vitmodel.utils import sha256_file, to_json, write_atomic

FORMAT_VERSION = 1
TENSORS_FILE, CONFIG_FILE, CARD_FILE = ("model.safetensors", "config.json", "MODEL_CARD.md")
TYPICALITY_FILE = "typicality.safetensors"
PACKAGE_FILES = (TENSORS_FILE, CONFIG_FILE, CARD_FILE, TYPICALITY_FILE)
ONNX_SUFFIX = ".onnx"  # of graphs, which are exported from a package later and are deleted when it is replaced
INTEGRITY_KEY = "integrity"
LARGEST_CONFIG = 64 << 20
"""Largest config.json in bytes."""
MOST_FILES = 1000
"""Largest number of files in the folder of a package."""
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".mar")
PROGRAM_SUFFIXES = (
    *(".py", ".pyc", ".pyd", ".pyz", ".so", ".dll", ".dylib", ".exe", ".sh", ".bash", ".bat", ".cmd", ".com", ".ps1"),
    *(".js", ".vbs", ".jar", ".whl", ".msi", ".scr", ".lnk", ".desktop"),
)
PROGRAM_STARTS = (b"\x7fELF", b"MZ", b"#!", b"\xca\xfe\xba\xbe", b"\xcf\xfa\xed\xfe", b"PK\x03\x04")
PICKLE_STARTS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
COPY_AGAIN = "copy the package again from where it was trained or published"

Shapes = dict[str, tuple[int, ...]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackageCheck:
    """What was checked of a model package. It is returned only if nothing was wrong.

    Attributes:
        folder: Where the files are.
        digest: SHA-256 that names the whole package, 64 hex digits; "" for a package of an older version.
        files: Name of each verified file -> its SHA-256.
        unlisted: Files in the folder that the package does not list. vitmodel does not read them.
        tensors: Number of tensors, all of them finite.
        parameters: Number of values in the tensors.

    Examples:
        >>> len(vitmodel.verify("run/package").digest)
        64
    """

    folder: Path
    digest: str
    files: Mapping[str, str]
    unlisted: tuple[str, ...]
    tensors: int
    parameters: int

    def __str__(self) -> str:
        lines = [f"{self.folder}: is a usable model package"]
        if self.digest:
            lines += [f"  digest         {self.digest}"]
            lines += [f"  SHA-256        {name}: {digest[:16]}... matches" for name, digest in self.files.items()]
        else:
            lines += ["  SHA-256        not checked: an older vitmodel wrote the package without digests"]
        lines += [
            "  config.json    every value has the right type and range",
            f"  tensors        {self.tensors} with {self.parameters} values: names and shapes fit, all are finite",
            "  check image    every output is finite",
            "  files          no pickle, no program, no link out of the folder",
        ]
        lines += [f"  not covered    {name}: is not listed; vitmodel does not read it" for name in self.unlisted]
        return "\n".join(lines)


def canonical_json(value: object) -> bytes:
    """Return JSON that is the same for equal values: keys sorted, no spaces, ASCII.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of config.json's canonical JSON without `integrity.digest`, as 64 hex digits."""
    integrity = {name: value for name, value in document[INTEGRITY_KEY].items() if name != "digest"}
    return hashlib.sha256(canonical_json({**document, INTEGRITY_KEY: integrity})).hexdigest()


def content_digest(folder: Path) -> str:
    """Return a digest of the values in config.json, without the hashes of files that it lists.

    A new model card or exported graph does not change it; everything that decides a score does.
    """
    document = json.loads((folder / CONFIG_FILE).read_bytes())
    return hashlib.sha256(canonical_json({key: document[key] for key in document if key != INTEGRITY_KEY})).hexdigest()


def seal(folder: Path, document: Mapping[str, Any]) -> None:
    """Write config.json with the SHA-256 of the other files of the package and its own digest.

    Args:
        folder: Folder of the package.
        document: Values of config.json.
    """
    plain: dict[str, Any] = json.loads(to_json(document))
    others = [path for path in sorted(folder.iterdir()) if path.name in PACKAGE_FILES or path.suffix == ONNX_SUFFIX]
    plain[INTEGRITY_KEY] = {"files": {path.name: sha256_file(path) for path in others if path.name != CONFIG_FILE}}
    plain[INTEGRITY_KEY]["digest"] = digest_of(plain)
    write_atomic(folder / CONFIG_FILE, to_json(plain))


def record_file(folder: Path, name: str) -> None:
    """Update config.json after the file `name` of a package was written; a package without digests stays without.

    Raises:
        VitmodelError: config.json is damaged or cannot be written.
    """
    document = read_document(folder)
    if INTEGRITY_KEY in document:
        names = {**document[INTEGRITY_KEY]["files"], name: ""}
        known = {other: digest for other, digest in names.items() if other != name and (folder / other).is_file()}
        document[INTEGRITY_KEY] = {"files": known | {name: sha256_file(folder / name)}}
        document[INTEGRITY_KEY]["digest"] = digest_of(document)
        write_atomic(folder / CONFIG_FILE, to_json(document))


def read_document(folder: Path) -> dict[str, Any]:
    """Return config.json after checking its version, every value, and its digest.

    Raises:
        VitmodelError: It is damaged, of another version, or holds an impossible value; the message names the value.
    """
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"larger than {LARGEST_CONFIG >> 20} MiB")
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict):
            raise UsageError(f"must be a mapping of names to values, not a {type(document).__name__}")
        version = document["format_version"]
        _check_version(path, version)
        document["architecture"]
        check_document(document)
        _check_integrity_block(document)
    except UsageError as error:
        remedy = f"{COPY_AGAIN}, or install the vitmodel that wrote it, which may be newer"
        raise VitmodelError(f"{path}: {error}; {remedy}") from error
    except RecursionError as error:
        raise VitmodelError(f"{path}: broken (nested too deeply); {COPY_AGAIN}") from error
    except (ValueError, KeyError) as error:
        raise VitmodelError(f"{path}: broken ({error!r}); {COPY_AGAIN} or repeat the training") from error
    except OSError as error:
        raise VitmodelError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    return document


def _check_version(path: Path, version: object) -> None:
    """Raise VitmodelError unless this vitmodel reads the format version."""
    if version == FORMAT_VERSION and not isinstance(version, bool):
        return
    newer = isinstance(version, int) and version > FORMAT_VERSION
    remedy = "a newer vitmodel wrote it, install that version"
    if not newer:
        remedy = "use the vitmodel that wrote it, or repeat the training"
    raise VitmodelError(f"{path}: format_version {version!r:.40}, this vitmodel reads {FORMAT_VERSION}; {remedy}")


def _check_integrity_block(document: Mapping[str, Any]) -> None:
    """Raise UsageError if config.json was changed after it was written."""
    if INTEGRITY_KEY not in document:
        for key, value in document.items():
            if isinstance(value, dict) and "digest" in value:  # a damaged key must not switch the check off
                raise UsageError(f"{INTEGRITY_KEY}: is missing, but {key!r:.40} holds its values")
        return
    block = document[INTEGRITY_KEY]
    files = block.get("files") if isinstance(block, dict) else None
    if not isinstance(files, dict) or not {TENSORS_FILE, CARD_FILE} <= files.keys():
        raise UsageError(f"{INTEGRITY_KEY}.files: must list {TENSORS_FILE} and {CARD_FILE} with their SHA-256")
    for name, digest in files.items():
        if name in ("", ".", "..", CONFIG_FILE) or "/" in name or "\\" in name or "\0" in name:
            raise UsageError(f"{INTEGRITY_KEY}.files: {name!r:.60} is not the name of another file in the folder")
        if not isinstance(digest, str):
            raise UsageError(f"{INTEGRITY_KEY}.files.{name}: must be a SHA-256 as text")
    if block.get("digest") != digest_of(document):
        raise UsageError(f"{INTEGRITY_KEY}.digest: does not fit the other values, so one of them was changed")


def check_files(folder: Path, document: Mapping[str, Any]) -> None:
    """Check the folder for files that do not belong there, and the SHA-256 of the tensors.

    A changed model card is only a warning here, because it decides no score; `verify` refuses it. Graphs are checked
    when they are used.

    Raises:
        VitmodelError: A file is missing or was changed, or is a pickle, a program or a link out of the folder.
    """
    scan_folder(folder)
    if INTEGRITY_KEY not in document:
        logger.warning(
            "%s: an older vitmodel wrote it without digests, so it cannot be checked for damage; "
            "train again or compare its files with the original",
            folder,
        )
        return
    check_digest(folder, document, TENSORS_FILE)
    if TYPICALITY_FILE in document[INTEGRITY_KEY]["files"] or (folder / TYPICALITY_FILE).exists():
        check_digest(folder, document, TYPICALITY_FILE)
    try:
        check_digest(folder, document, CARD_FILE)
    except VitmodelError as error:
        logger.warning("%s", error)


def check_digest(folder: Path, document: Mapping[str, Any], name: str) -> None:
    """Raise VitmodelError if a file of the package is not listed, is missing or differs from its listed SHA-256."""
    path = folder / name
    remedy = "export it again with `vitmodel export`" if path.suffix == ONNX_SUFFIX else COPY_AGAIN
    if INTEGRITY_KEY not in document:
        return
    listed = document[INTEGRITY_KEY]["files"].get(name)
    if listed is None:
        raise VitmodelError(f"{path}: is not listed in {CONFIG_FILE}, so it cannot be checked; {remedy}")
    try:
        found = sha256_file(path)
    except OSError as error:
        raise VitmodelError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    if found != listed:
        raise VitmodelError(
            f"{path}: was changed or damaged: its SHA-256 is {found[:16]}..., but {CONFIG_FILE} lists "
            f"{listed[:16]}...; {remedy}"
        )


def check_graph(folder: Path, path: Path) -> None:
    """Raise VitmodelError if a graph of a package was not written by `export` or was changed since.

    A graph that is missing is left to the function that loads it.
    """
    if path.is_file():
        check_digest(folder, read_document(folder), path.name)


def scan_folder(folder: Path) -> list[str]:
    """Return the files below `folder`, relative to it.

    Raises:
        VitmodelError: One is a pickle, a program, not a regular file, or a link out of the folder.
    """
    names: list[str] = []
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place) / name
            if path.is_symlink() and not _links_inside(path, folder):
                raise VitmodelError(f"{path}: is a link out of the package; copy the file itself, as `cp -L` does")
            if path.is_dir():
                continue
            if problem := _foreign_content(path):
                raise VitmodelError(f"{path}: {problem}, which no model package contains; delete it or {COPY_AGAIN}")
            names.append(path.relative_to(folder).as_posix())
            if len(names) > MOST_FILES:
                raise VitmodelError(f"{folder}: has more than {MOST_FILES} files; name the folder of the package")
    return sorted(names)


def _links_inside(link: Path, folder: Path) -> bool:
    """Return whether a link stays in the package or, in a snapshot of huggingface_hub's cache, among its blobs."""
    target = link.resolve()
    blobs = folder.parent.parent / "blobs"
    in_cache = folder.parent.name == "snapshots" and target.parent == blobs.resolve()
    return in_cache or target.is_relative_to(folder.resolve())


def _foreign_content(path: Path) -> str:
    """Return what a file is, if it is something that could run code; empty if it is not."""
    if not stat.S_ISREG(path.stat().st_mode):
        return "is not a regular file"
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(4)
    if suffix in PICKLE_SUFFIXES or start.startswith(PICKLE_STARTS):
        return "may be a pickle"
    # the size in front of safetensors' header could begin with any of these bytes
    if suffix in PROGRAM_SUFFIXES or (suffix != ".safetensors" and start.startswith(PROGRAM_STARTS)):
        return "may be a program"
    return ""


def read_shapes(path: Path) -> Shapes:
    """Return the shape of each tensor in a safetensors file from its header; the tensors are not read.

    Raises:
        VitmodelError: The file is broken, or a tensor is not in 32 bits.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise VitmodelError(f"{path}: broken ({error}); {COPY_AGAIN}") from error
    if wrong := sorted(name for name, kind in kinds.items() if kind != "F32"):
        raise VitmodelError(f"{path}: {wrong[0]} is of type {kinds[wrong[0]]}, not F32; {COPY_AGAIN}")
    return shapes


def build_networks(config: NetworkConfig, members: int, shapes: Shapes) -> list[Network]:
    """Return networks without tensors, whose names and shapes fit those of the file.

    Sizes are compared before a network is built, so that an impossible one takes neither memory nor time.

    Args:
        config: Architecture of each network.
        members: Number of networks.
        shapes: Result of `read_shapes`.

    Raises:
        UsageError: A value of the architecture contradicts the tensors; the message names it.
    """
    for name, count in (
        ("members", members),
        ("architecture.depth", config.vit.depth),
        ("architecture.exam.depth", config.exam.depth if config.exam else 0),
    ):
        if count > len(shapes):
            raise UsageError(f"{name}: {count} is impossible, because the file has only {len(shapes)} tensors")
    try:
        with torch.device("meta"):
            networks = [Network(config) for _ in range(members)]
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"architecture: no network has these sizes ({str(error).splitlines()[0][:100]})") from error
    expected: Shapes = {}
    for number, network in enumerate(networks):
        prefix = f"{number}." if members > 1 else ""
        expected |= {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in network.tensors().items()}
    for name in [*expected, *shapes]:
        if expected.get(name) != shapes.get(name):
            wanted, found = (str(some[name]) if name in some else "no such tensor" for some in (expected, shapes))
            raise UsageError(f"architecture: needs {wanted} for {name}, but {TENSORS_FILE} has {found}")
    return networks
