"""Generate the reference pages from the code: command line, Python API, manifest columns, reason codes, formats.

MkDocs calls `on_files`. The functions that make the pages need no MkDocs, so that tests can call them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Every module that the generated pages read. Change these lines when a module moves.
CLI = "vitmodel.cli"
CONFIG = "vitmodel.config"
OPTIONS = "vitmodel.config.options"
MANIFEST = "vitmodel.data.columns"
VERDICT = "vitmodel.pixels.verdict"
HEADER_MEANING = "vitmodel.pixels.header_meaning"
PICTURE_HEADER = "vitmodel.pixels.picture_header"
DECODING = "vitmodel.pixels.decoding"
LISTING = "vitmodel.releases.listing"
TABLES = "vitmodel.data.tables"
ARCHIVES = "vitmodel.archives.index"
WEIGHT_FILES = "vitmodel.model.weight_files"
API = "vitmodel"
NOTICE = '!!! warning "Research software, not a medical device"\n    Do not use its scores for clinical decisions.\n'


# ---------------------------------------------------------------- command line
@dataclasses.dataclass(frozen=True)
class Flag:
    """One field of a verb's configuration, as the reference shows it."""

    name: str
    kind: str
    default: str
    description: str
    group: str
    """Title of the table that shows the flag."""


def flags_of(cls: type) -> list[Flag]:
    """Return the flags of a configuration class in the order of its fields, those of nested classes included."""
    return [flag_from_option(option) for option in importlib.import_module(OPTIONS).options(cls)]


def flag_from_option(option: Any) -> Flag:
    """Return an option of `vitmodel.config.options`, which --help shows, as a row of the reference."""
    kind = ", ".join(f"`{choice}`" for choice in option.choices) or option.kind
    if option.is_list:
        kind = f"list of {kind}" if option.choices else kind
    default = "required" if option.required else f"`{option.default_text}`"
    return Flag(option.name, kind, default, option.description, option.group.capitalize())


def flag_table(flags: list[Flag]) -> list[str]:
    """Return a Markdown table of flags."""
    lines = ["| flag | type | default | description |", "|---|---|---|---|"]
    for flag in flags:
        name = f"--{flag.name.replace('_', '-')}"
        lines.append(f"| `{name}` | {cell(flag.kind)} | {cell(flag.default)} | {cell(flag.description)} |")
    return lines


def cell(text: str) -> str:
    """Return text that fits into one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def command_line_page() -> str:
    """Return the page of all verbs and their flags."""
    cli = importlib.import_module(CLI)
    config = importlib.import_module(CONFIG)
    lines = [
        "# Command line",
        "",
        "Generated from the configuration classes of `vitmodel.config`. `vitmodel VERB --help` prints the same text.",
        "",
        "- Each flag is also a key of a YAML recipe with underscores (`--batch-size` is `batch_size`): "
        "`vitmodel VERB --config RECIPE.yaml`. Flags after `--config` override the recipe.",
        "- A switch is turned on by `--flag` and off by `--no-flag`.",
        "- Required values may be given in order without their flag: `vitmodel etl SOURCE OUT`.",
        "- The exit status is 0 for success, 1 for a failure (or a refused image in `predict`), 2 for wrong "
        "usage and 130 for an interruption.",
        "",
        NOTICE,
    ]
    for name, verb in cli.VERBS.items():
        cls = getattr(config, verb.config)
        lines += [
            "",
            f"## {name}",
            "",
            inspect.cleandoc(cls.__doc__ or ""),
            "",
            f"How-to: [vitmodel {name}](../how-to/{verb.guide or name}.md)",
        ]
        flags = flags_of(cls)
        required = [flag for flag in flags if flag.default == "required"]
        usage = " ".join(flag.name.upper() for flag in required)
        lines += [
            "",
            "```text",
            f"vitmodel {name} {usage} [--config RECIPE.yaml] [--FLAG VALUE ...]".replace("  ", " "),
            "```",
        ]
        for title, group in grouped(flags):
            lines += ["", f"**{title}**", "", *flag_table(group)]
    return "\n".join(lines) + "\n"


def grouped(flags: list[Flag]) -> Iterator[tuple[str, list[Flag]]]:
    """Yield flags under a title: the required ones, then each group in order of first appearance."""
    required = [flag for flag in flags if flag.default == "required"]
    if required:
        yield "Required", required
    optional = [flag for flag in flags if flag.default != "required"]
    for title in dict.fromkeys(flag.group for flag in optional):
        yield title, [flag for flag in optional if flag.group == title]


# ---------------------------------------------------------------- tables of the data
def manifest_page() -> str:
    """Return the page of the manifest's columns."""
    manifest = importlib.import_module(MANIFEST)
    roles = {
        "id": "identifies the image, the patient or the file; never an input",
        "input": "may be used as an input (`--sources`)",
        "target": "what is learned or measured; never an input",
        "provenance": "where the image comes from and what was done to it",
    }
    lines = [
        "# Manifest columns",
        "",
        "A manifest is a CSV file with one row per image. `vitmodel etl` writes it; `train`, `evaluate`, `compare`, "
        "`leave-out` and `predict` read it. Rows are never dropped: an image that cannot be used keeps its row with "
        "`status` `refused` and a [reason code](reason-codes.md).",
        "",
        "- What is unknown is empty (NaN), never 0.",
        "- Paths are relative to the manifest's folder, or absolute.",
        "- A `flag` is 0 or 1. A `number` is decimal. All other columns are text.",
        "- Further columns are kept as text and may be used by `--sources`.",
        "",
        "| role | meaning |",
        "|---|---|",
        *(f"| {role} | {meaning} |" for role, meaning in roles.items()),
        "",
        "| column | kind | role | required | values | meaning |",
        "|---|---|---|---|---|---|",
    ]
    for column in manifest.COLUMNS:
        choices = ", ".join(f"`{choice}`" if choice else "empty" for choice in column.choices)
        required = "yes" if column.required else ""
        cells = [f"`{column.name}`", column.kind, column.role, required, choices, cell(column.meaning)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def reason_codes_page() -> str:
    """Return the page of the codes for which an image is refused or used with a warning."""
    verdict = importlib.import_module(VERDICT)
    rules = importlib.import_module(HEADER_MEANING).HEADER_RULES
    lines = [
        "# Reason codes",
        "",
        "The columns `status`, `reason` and `remark` of a manifest and of the score tables say what is wrong with an "
        "image. `reason` holds one or more of these codes, separated by `;`. `remark` has a sentence with the "
        "particulars of this file.",
        "",
        "## Refused",
        "",
        "A refused image is never scored. `vitmodel predict` returns the exit status 1 if any image was refused.",
        "",
        *code_table(verdict.REFUSAL_REASONS),
        "",
        "## Warned",
        "",
        "The image is used. Its score deserves a second look.",
        "",
        *code_table(verdict.WARNING_REASONS),
        "",
        "## Header patterns",
        "",
        "What the header of a DICOM file says about its picture, in the order in which it is searched.",
        "",
        "| pattern | verdict | code |",
        "|---|---|---|",
        *(f"| {cell(rule.pattern)} | {rule.verdict} | `{rule.code}` |" for rule in rules),
    ]
    return "\n".join(lines) + "\n"


def code_table(codes: dict[str, str]) -> list[str]:
    """Return a Markdown table of codes and their meaning."""
    rows = [f"| `{code}` | {cell(meaning)} |" for code, meaning in codes.items()]
    return ["| code | meaning |", "|---|---|", *rows]


def formats_page() -> str:
    """Return the page of the file formats that are read or refused."""
    lines = [
        "# File formats",
        "",
        "Which files are read, and which are refused by name. An image is recognised by its first bytes, whatever its "
        "name. What makes an image of a readable format refused or warned: [Reason codes](reason-codes.md).",
    ]
    for title, rows in (
        ("Images", image_rows()),
        ("Pixels of DICOM files", syntax_rows()),
        ("Archives, tables and weights", container_rows()),
    ):
        lines += ["", f"## {title}", "", "| format | recognised by | verdict |", "|---|---|---|"]
        lines += [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


Row = tuple[str, str, str]
"""Format, how it is recognised, and its verdict."""


def image_rows() -> Iterator[Row]:
    """Yield the formats of images."""
    listing = importlib.import_module(LISTING)
    header = importlib.import_module(PICTURE_HEADER)
    yield "DICOM", "`DICM` after 128 bytes, or a first element of group 2 or 8", "read"
    for name in header.STARTS:
        yield name, "first bytes", "read"
    yield f"a name that ends in {code_list(listing.IMAGE_SUFFIXES)}", "suffix", "a row of the manifest, read or refused"
    yield (
        "a name that ends in another suffix or none",
        "first bytes",
        "read if they are those of DICOM, else left out of a folder's listing and counted by suffix",
    )
    yield f"a name that ends in {code_list(sorted(listing.OTHER_SUFFIXES))}", "suffix", "left out of a folder's listing"
    for name in dict.fromkeys(header.UNSUPPORTED_STARTS.values()):
        yield name, "first bytes", "refused as `not_an_image`"


def syntax_rows() -> Iterator[Row]:
    """Yield the transfer syntaxes of DICOM with their decoders."""
    from pydicom.uid import UID

    for syntax, decoders in importlib.import_module(DECODING).DECODERS.items():
        yield UID(syntax).name, f"`{syntax}`", f"read with {' or '.join(decoder.name for decoder in decoders)}"
    yield "any other transfer syntax", "TransferSyntaxUID", "refused as `undecodable`"


def container_rows() -> Iterator[Row]:
    """Yield the formats of archives, tables and weights."""
    archives = importlib.import_module(ARCHIVES)
    tables = importlib.import_module(TABLES)
    weights = importlib.import_module(WEIGHT_FILES)
    yield "zip, uncompressed tar", "first bytes", "read in place"
    for name in archives.COMPRESSED_STARTS.values():
        yield f"{name} archive", "first bytes", "refused as `unreadable`: unpack it"
    yield "table of text", code_list(tables.TEXT_TABLE_SUFFIXES), "read with commas, semicolons or tabs"
    yield "spreadsheet", code_list(tables.SPREADSHEET_SUFFIXES), "read, the first sheet"
    yield "safetensors", "first bytes, or `.safetensors`", "read as weights"
    yield "safetensors in shards", f"`{weights.SHARD_INDEX}` in the folder", "read as weights"
    yield "arrays of NumPy", "`.npz`", "read as weights, without pickled objects"
    yield "ONNX", f"`{weights.ONNX_SUFFIX}`", "its constants are read as weights (extra `export`)"
    yield "checkpoint of PyTorch", code_list(weights.PICKLED), "its tensors are read as weights, code is never run"


def code_list(words: Iterable[str]) -> str:
    """Return words as code, separated by commas."""
    return ", ".join(f"`{word}`" for word in words)


# ---------------------------------------------------------------- Python API
def api_page() -> str:
    """Return the page of the Python API: each name in `vitmodel.__all__`, documented by mkdocstrings."""
    package = importlib.import_module(API)
    names = [name for name in package.__all__ if not name.startswith("_")]
    lines = [
        "# Python API",
        "",
        "These are the public names of `vitmodel`. Importing the package is cheap; each name is loaded when it is "
        "first used. The command line calls the same functions, so both give the same results.",
        "",
        NOTICE,
    ]
    for name in names:
        target = getattr(package, name)
        path = f"{target.__module__}.{target.__qualname__}" if hasattr(target, "__qualname__") else f"{API}.{name}"
        lines += ["", f"::: {path}", *options(heading=f"{API}.{name}", toc_label=f"{API}.{name}")]
    return "\n".join(lines) + "\n"


def options(**values: object) -> list[str]:
    """Return the indented options of one mkdocstrings block."""
    return ["    options:", *(f"      {key}: {value}" for key, value in values.items())]


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": command_line_page,
    "reference/manifest.md": manifest_page,
    "reference/reason-codes.md": reason_codes_page,
    "reference/formats.md": formats_page,
    "reference/api.md": api_page,
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site (an event of MkDocs)."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files
