"""The command line `vitmodel VERB ...`. The module of a verb is imported only when the verb runs."""

from __future__ import annotations

import importlib
import json
import logging
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vitmodel import __doc__ as summary
from vitmodel import __version__, config
from vitmodel.config.base import FORMER_NAMES, Config, flag_of
from vitmodel.config.options import GROUPS, Option, options
from vitmodel.config.recipes import with_recipe_paths
from vitmodel.console import describe_output_failure, guarded_streams
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.jobs.limits import check_address_space
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

logger = logging.getLogger("vitmodel")


class Verb(NamedTuple):
    """The configuration class of a verb and the function that runs it."""

    config: str
    """Name of the class in `vitmodel.config`."""
    module: str
    function: str
    """Function of `module` to call with an instance of the class."""
    group: Literal["data", "training", "evaluation", "prediction", "sharing", "other"]
    """Heading in `vitmodel --help`."""
    guide: str = ""
    """How-to page of the verb in docs/how-to, without .md; empty = the page named after the verb."""
    library: Literal["", "numpy", "torch"] = "torch"
    """The largest library that the verb imports; see `ADDRESS_SPACE`."""

    @property
    def cls(self) -> type[Config]:
        """Return the configuration class."""
        cls: type[Config] = getattr(config, self.config)
        return cls

    @property
    def paragraphs(self) -> list[str]:
        """Return the paragraphs of the class's docstring, each as one line; the first is the summary."""
        return [" ".join(paragraph.split()) for paragraph in str(self.cls.__doc__).split("\n\n")]


VERBS = {
    "synth": Verb("SynthConfig", "vitmodel.commands.synth", "synth", "data", library="numpy"),
    "etl": Verb("ETLConfig", "vitmodel.commands.etl", "etl", "data", library="numpy"),
    "recipes": Verb("RecipesConfig", "vitmodel.commands.recipes", "recipes", "training", library=""),
    "weights": Verb("WeightsConfig", "vitmodel.commands.weights", "weights", "training", library=""),
    "pretrain": Verb("PretrainConfig", "vitmodel.commands.pretrain", "pretrain", "training"),
    "train": Verb("TrainConfig", "vitmodel.commands.train", "train", "training"),
    "tune": Verb("TuneConfig", "vitmodel.commands.tune", "tune", "training"),
    "versions": Verb("VersionsConfig", "vitmodel.commands.versions", "versions", "training"),
    "evaluate": Verb("EvaluateConfig", "vitmodel.commands.evaluate", "evaluate", "evaluation"),
    "compare": Verb("CompareConfig", "vitmodel.commands.compare", "compare_models", "evaluation"),
    "leave-out": Verb("LeaveOutConfig", "vitmodel.commands.leave_out", "leave_one_out", "evaluation", library="numpy"),
    "predict": Verb("PredictConfig", "vitmodel.commands.predict", "predict", "prediction"),
    "view": Verb("ViewConfig", "vitmodel.commands.view", "view", "prediction"),
    "serve": Verb("ServeConfig", "vitmodel.commands.serve", "serve", "prediction"),
    "node": Verb("NodeConfig", "vitmodel.commands.node", "node", "prediction"),
    "keys": Verb("KeysConfig", "vitmodel.commands.keys", "make_key", "prediction", "serve"),
    "export": Verb("ExportConfig", "vitmodel.commands.export", "export", "prediction"),
    "verify": Verb("VerifyConfig", "vitmodel.commands.verify", "verify", "prediction"),
    "drift": Verb("DriftConfig", "vitmodel.commands.drift", "drift", "prediction"),
    "push": Verb("PushConfig", "vitmodel.commands.push", "push", "sharing", "share-a-package"),
    "pack": Verb("PackConfig", "vitmodel.commands.pack", "pack_package", "sharing", "share-a-package"),
    "unpack": Verb("UnpackConfig", "vitmodel.commands.unpack", "unpack_package", "sharing", "share-a-package"),
    "demo": Verb("DemoConfig", "vitmodel.commands.demo", "demo", "other", library=""),
    "info": Verb("InfoConfig", "vitmodel.commands.info", "info", "other", library="numpy"),
}
ADDRESS_SPACE = {"": 0, "numpy": 800_000_000, "torch": 2_000_000_000}
"""Bytes of address space that importing a library and starting its threads need; memory for images comes on top."""
WIDTH = 100
"""Maximum width of --help in columns."""
COLUMN = 28
"""Column at which help texts start."""


def help_text() -> str:
    """Return what `vitmodel --help` prints."""
    lines = [
        f"{summary}".strip(),
        "",
        "usage: vitmodel VERB ...",
        "       vitmodel VERB --help    show the options of a verb",
    ]
    group = ""
    for name, verb in VERBS.items():
        if verb.group != group:
            group = verb.group
            lines += ["", f"{group}:"]
        lines += _entry(name, verb.paragraphs[0], _width(), column=14)
    return "\n".join([*lines, "", NOT_A_MEDICAL_DEVICE])


def verb_help(name: str) -> str:
    """Return what `vitmodel NAME --help` prints: usage, description, and all options in groups."""
    width = _width()
    described = options(VERBS[name].cls)
    parts = [textwrap.fill(usage_of(name), width, subsequent_indent=" " * len(f"usage: vitmodel {name} "))]
    parts += [textwrap.fill(paragraph, width) for paragraph in VERBS[name].paragraphs]
    required = [option for option in described if option.required]
    optional = [option for option in described if not option.required]
    parts.append(_section("required, by position or as a flag", required, width))
    for group in GROUPS:
        parts.append(_section(group, [option for option in optional if option.group == group], width))
    general = [
        *_entry(
            "--config RECIPE.yaml",
            "Read options from a YAML file whose keys are the names of the flags. Later flags override it.",
            width,
        ),
        *_entry("--print-config", "Print the resulting configuration as YAML and exit.", width),
        *_entry("-h, --help", "Show this help and exit.", width),
    ]
    parts.append("\n".join(["general:", *general]))
    return "\n\n".join(part for part in parts if part)


def usage_of(name: str) -> str:
    """Return the usage line of a verb."""
    places = [option.placeholder for option in options(VERBS[name].cls) if option.required]
    return " ".join([f"usage: vitmodel {name}", *places, "[--config RECIPE.yaml] [--FLAG VALUE ...]"])


def _section(title: str, described: Iterable[Option], width: int) -> str:
    """Return a heading of --help and the options below it; empty if there are none."""
    lines = [line for option in described for line in _entry(option.invocation, option.help, width)]
    return "\n".join([f"{title}:", *lines]) if lines else ""


def _entry(head: str, text: str, width: int, column: int = COLUMN) -> list[str]:
    """Return a name and its text in two columns."""
    lines = textwrap.wrap(text, width - column, break_long_words=False, break_on_hyphens=False)
    head = f"  {head}"
    if len(head) <= column - 2:
        lines[0] = f"{head:<{column}}{lines[0]}"
        return [lines[0], *(" " * column + line for line in lines[1:])]
    return [head, *(" " * column + line for line in lines)]


def _width() -> int:
    """Return the width of the terminal in columns, limited to the range from 60 to WIDTH."""
    return max(60, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def parser_for(name: str) -> ArgumentParser:
    """Return the parser of a verb: every field of its dataclass is a flag and a YAML key."""
    import jsonargparse
    from jsonargparse.typing import get_registered_type, register_type

    for parsed in (config.Size, config.FreezeEpochs):
        if get_registered_type(parsed) is None:
            register_type(parsed, str, parsed.parse)
    parser = jsonargparse.ArgumentParser(
        prog=f"vitmodel {name}", add_help=False, allow_abbrev=False, exit_on_error=False, print_config="--print-config"
    )
    parser.add_argument("--config", action="config")
    for option in options(VERBS[name].cls):
        default = None if option.required else _parser_default(option)
        parser.add_argument(option.flag, type=_parsed_type(option), default=default)
        for former in _former_names(option.name):  # in recipes; `normalise` renames flags
            parser.add_argument(f"--{former}", type=_parsed_type(option), default=jsonargparse.SUPPRESS)
    return parser


def _former_names(name: str) -> list[str]:
    """Return the names that an option had before."""
    return [old for old, new in FORMER_NAMES.items() if new == name]


def _parsed_type(option: Option) -> Any:
    """Return the type that the parser reads; the configuration itself checks choices, paths and the items of lists."""
    if option.is_list:
        return list[str] | str | bool | None if option.is_switch else list[str] | str | None
    kind = type(option.choices[0]) if option.choices else option.hint
    kind = str if kind is Path else kind
    return kind | None if option.optional or option.required else kind


def _parser_default(option: Option) -> Any:
    """Return the default of an option as the parser reads it: lists instead of tuples, text instead of paths."""
    if option.is_list:
        return [str(item) if isinstance(item, Path) else item for item in option.default]
    return str(option.default) if isinstance(option.default, Path) else option.default


def normalise(arguments: Sequence[str], name: str) -> list[str]:
    """Spell every argument as the parser does, `--some-flag=value`.

    `--drop_path 0` becomes `--drop-path=0`, `--resume` becomes `--resume=true`, and `--no-resume` becomes
    `--resume=false`. An argument without a flag is the value of the next required option. The values of a list become
    one JSON text: those of all its flags or, for a required list, all arguments without a flag that the other required
    options leave.

    Raises:
        UsageError: A flag is unknown or lacks its value, or there are too many arguments.
    """
    by_flag = {option.flag: option for option in options(VERBS[name].cls)}
    given: list[tuple[str, str | None]] = []
    lists: dict[str, list[str]] = {}
    bare: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            bare.append(word)
            continue
        for flag, value in _flags_of(word, rest, by_flag, name):
            if value is not None and flag in by_flag and by_flag[flag].is_list:
                lists.setdefault(flag, []).append(value)
                given = [pair for pair in given if pair[0] != flag]
                value = _to_json(lists[flag])
            given.append((flag, value))
    places = [option for option in by_flag.values() if option.required and option.flag not in dict(given)]
    words = [flag if value is None else f"{flag}={value}" for flag, value in given]
    return words + _positional(bare, places, name)


def _flags_of(word: str, rest: list[str], by_flag: dict[str, Option], name: str) -> list[tuple[str, str | None]]:
    """Return the flags that the argument `word` sets, with their values.

    If the value is the next argument, it is removed from `rest`.
    """
    text, equals, value = word.partition("=")
    flag = text.replace("_", "-")
    current = flag_of(FORMER_NAMES.get(flag.removeprefix("--"), ""))
    if flag not in by_flag and current in by_flag:
        flag = current
    switch = "--" + flag.removeprefix("--no-").removeprefix("--")
    switches = {option.flag for option in by_flag.values() if option.hint is bool or option.is_switch}
    if flag == "--print-config":
        return [(flag, value if equals else None)]
    named = [option for option in by_flag.values() if option.required and flag.removeprefix("--") in option.choices]
    if named and not equals:  # an action may be spelled as a flag: `node --demo`
        return [(named[0].flag, flag.removeprefix("--"))]
    if flag not in by_flag and switch in switches:
        return [(switch, "false")]
    if flag in switches and not equals:
        return [(flag, rest.pop(0) if rest and _sets_switch(rest[0], by_flag[flag]) else "true")]
    nested = [option for option in by_flag.values() if option.flag.startswith(f"{flag}.")]
    if flag not in by_flag and flag != "--config" and not nested:
        raise UsageError(_unknown(text, flag, list(by_flag), name))
    if not equals and not rest:
        raise UsageError(f"{text}: needs a value; `vitmodel {name} --help` explains it")
    value = value if equals else rest.pop(0)
    return _expanded(flag, value) if nested else [(flag, value)]


def _sets_switch(word: str, option: Option) -> bool:
    """Return whether `word` is a value of the switch before it: true, false or, for a list, some of its choices."""
    return word in ("true", "false") or (option.is_list and set(word.split(",")) <= set(option.choices))


def _expanded(flag: str, value: str) -> list[tuple[str, str | None]]:
    """Return a flag for each key of a nested configuration given as a YAML mapping, as in `--augment '{flip: 0}'`."""
    import yaml

    mapping = yaml.safe_load(value)
    if not isinstance(mapping, dict):
        raise UsageError(f"{flag}: {value!r} is not a mapping; write {flag}.KEY VALUE, or {flag} '{{KEY: VALUE}}'")
    return [(f"{flag}.{key}", str(item)) for key, item in mapping.items()]


def _positional(bare: list[str], places: list[Option], name: str) -> list[str]:
    """Assign the arguments without a flag to the required options, in order; a list takes what the others leave."""
    result: list[str] = []
    surplus = max(0, len(bare) - len(places))
    for option in places:
        count = 1 + surplus if option.is_list else 1
        values = bare[:count]
        bare = bare[count:]
        if values:
            result.append(f"{option.flag}={_to_json(values) if option.is_list else values[0]}")
    if bare:
        raise UsageError(f"unexpected argument {bare[0]!r}; {usage_of(name)}")
    return result


def _to_json(values: list[str]) -> str:
    """Return values as one JSON text; the parser cannot read the lone surrogates of names that are not UTF-8."""
    from vitmodel.archives import path_to_text

    return json.dumps([path_to_text(value) for value in values])


def _unknown(text: str, name: str, known: Iterable[str], verb: str) -> str:
    """Return the message for an unknown flag or recipe key, with the most similar existing one."""
    advice = f"{config.did_you_mean(name, known)} `vitmodel {verb} --help` lists all options".strip()
    return f"{text}: unknown option; {advice}"


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Return the configuration of verb `name` from command-line arguments.

    Raises:
        UsageError: A flag or key is unknown, or a value is impossible; the message names it.
        SystemExit: With status 0, after --help or --print-config.
    """
    import jsonargparse

    if any(argument in ("-h", "--help") for argument in arguments):
        print(verb_help(name))
        raise SystemExit(0)
    cls = VERBS[name].cls
    try:
        words = normalise(with_recipe_paths(arguments), name)
        values = parser_for(name).parse_args(words).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UsageError(_parser_message(str(error), name)) from error
    values.pop("config", None)  # the recipe, which is merged into the other values
    for former, current in FORMER_NAMES.items():  # a recipe's; a flag has precedence
        if former in values and not any(word.startswith(f"{flag_of(current)}=") for word in words):
            values[current] = values[former]
        values.pop(former, None)
    missing = [option for option in options(cls) if option.required and values[option.name] is None]
    if missing:
        raise UsageError(f"{missing[0].name}: is missing; {usage_of(name)}")
    return config.make_config(cls, values)


def _parser_message(message: str, name: str) -> str:
    """Return the parser's error as one line that names the option and the values it accepts."""
    by_name = {option.name: option for option in options(VERBS[name].cls)}
    key = re.search(r"^Option '([^']+)' is not accepted", message)
    if key:
        return _unknown(key[1], key[1], by_name, name)
    field = re.search(r'^Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    if field and value and field[1] in by_name:
        return f"{field[1]}: must be {by_name[field[1]].kind}, not {value[1]!r}"
    lines = [line.strip() for line in re.sub(r'^Parser key "([^"]+)":', r"\1:", message).splitlines()]
    return " ".join(line for line in lines if line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, 1 for a failure, 2 for wrong usage, 130 after an interrupt.

    The verb also runs to its end where standard output cannot be written; the status is then 1 at least.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with guarded_streams() as output:
        try:
            status = _run(arguments)
        except SystemExit as ended:  # after --help or --print-config
            status = ended.code if isinstance(ended.code, int) else 0
        problem = describe_output_failure(output)
        if problem:
            print(f"vitmodel: {problem}", file=sys.stderr)
        return status or int(bool(problem))


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"vitmodel {__version__}")
        return 0
    name, *rest = arguments
    if name not in VERBS:
        advice = f"{config.did_you_mean(name, VERBS)} The verbs are {', '.join(VERBS)}".strip()
        print(f"vitmodel: unknown verb {name!r}; {advice}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s")
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        settings = parse(name, rest)
        verb = VERBS[name]
        check_address_space(ADDRESS_SPACE[verb.library])
        status = getattr(importlib.import_module(verb.module), verb.function)(settings)
        return status if isinstance(status, int) else 0
    except VitmodelError as error:
        print(f"vitmodel {name}: {error}", file=sys.stderr)
        return error.status
    except (MemoryError, ImportError) as error:
        if isinstance(error, ImportError) and "failed to map" not in str(error):
            raise
        print(
            f"vitmodel {name}: out of memory ({error or 'an array was too large'}); raise the limit (ulimit -v), "
            "or use a machine with more memory",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"\nvitmodel {name}: interrupted; finished work is kept", file=sys.stderr)
        return 130
    finally:
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
