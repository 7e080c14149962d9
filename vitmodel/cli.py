"""`vitmodel VERB ...`: one line per verb. Knows the names of the stages and imports one only to run it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from vitmodel import __doc__ as summary
from vitmodel import __version__, config
from vitmodel.config.recipes import with_recipe_paths
from vitmodel.utils import UsageError, VitmodelError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Verb(NamedTuple):
    """A stage: its configuration's class in `vitmodel.config`, and the function to call with it."""

    config: str
    module: str
    function: str


VERBS = {
    "synth": Verb("SynthConfig", "vitmodel.data.synthetic", "write_release"),
    "etl": Verb("ETLConfig", "vitmodel.image_ETL", "etl"),
    "pretrain": Verb("PretrainConfig", "vitmodel.pretrain", "pretrain"),
    "train": Verb("TrainConfig", "vitmodel.train", "train"),
    "tune": Verb("TuneConfig", "vitmodel.tune", "tune"),
    "evaluate": Verb("EvaluateConfig", "vitmodel.evaluate", "evaluate"),
    "compare": Verb("CompareConfig", "vitmodel.compare", "compare_models"),
    "leave-out": Verb("LeaveOutConfig", "vitmodel.leave_out", "leave_each_out"),
    "predict": Verb("PredictConfig", "vitmodel.predict", "predict"),
    "serve": Verb("ServeConfig", "vitmodel.serve", "serve"),
    "versions": Verb("VersionsConfig", "vitmodel.versions", "versions"),
    "export": Verb("ExportConfig", "vitmodel.export", "export"),
    "demo": Verb("DemoConfig", "vitmodel.demo", "demo"),
    "info": Verb("InfoConfig", "vitmodel.info", "info"),
}


def help_text() -> str:
    """What `vitmodel --help` prints."""
    lines = [f"{summary}\n", "usage: vitmodel VERB ...   (vitmodel VERB --help explains the flags)\n"]
    for name, verb in VERBS.items():
        doc = getattr(config, verb.config).__doc__.split("\n")[0]
        lines.append(f"  {name:<10} {doc}")
    return "\n".join(lines)


def positionals(cls: type) -> list[str]:
    """The fields that have no default; on the command line they may stand without a flag, in this order."""
    return [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]


def lists(cls: type) -> set[str]:
    """The fields that hold several values."""
    return {field.name for field in fields(cls) if str(field.type).startswith("list")}


def parser_for(name: str) -> ArgumentParser:
    """The parser of a verb: every field of its dataclass is a flag and a YAML key."""
    import jsonargparse
    from jsonargparse.typing import get_registered_type, register_type

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    if get_registered_type(config.Size) is None:
        register_type(config.Size, str, config.Size.parse)
    cls = getattr(config, VERBS[name].config)
    places = [place.upper() + " ..." * (place in lists(cls)) for place in positionals(cls)]
    usage = " ".join([f"vitmodel {name}", *places, "[--config RECIPE.yaml] [--FLAG VALUE ...]"])
    parser = jsonargparse.ArgumentParser(prog=f"vitmodel {name}", usage=usage, description=cls.__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file or packaged recipe, such as rsna; flags after it override its keys.")
    parser.add_class_arguments(cls)
    return parser


def normalise(arguments: Sequence[str], cls: type) -> list[str]:
    """Spell every argument as jsonargparse does, `--name=value`.

    `--drop-path 0` becomes `--drop_path=0`, `--resume` `--resume=true`, `--no-resume` `--resume=false`, and a bare argument
    the value of the next positional field. A field that is a list takes all bare arguments that the others leave, or grows by each
    of its flags.
    """
    booleans = {field.name for field in fields(cls) if field.type in ("bool", "bool | None")}
    bare: list[str] = []
    result: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("-") or flag == "-":
            bare.append(argument)
        elif flag == "-h" or name in ("help", "print_config"):
            result.append(argument)
        elif name in lists(cls) and (equals or rest):
            result.append(f"--{name}+={value if equals else rest.pop(0)}")
        elif equals:
            result.append(f"--{name}={value}")
        elif name in booleans:
            result.append(f"--{name}={rest.pop(0) if rest[:1] in (['true'], ['false']) else 'true'}")
        elif name.removeprefix("no_") in booleans:
            result.append(f"--{name.removeprefix('no_')}=false")
        else:
            result.extend([f"--{name}", *rest[:1]])
            rest = rest[1:]
    places = [place for place in positionals(cls) if f"--{place}" not in {word.partition("=")[0] for word in result}]
    surplus = max(0, len(bare) - len(places))
    for place in places:
        taken = 1 + surplus if place in lists(cls) else 1
        values, bare = bare[:taken], bare[taken:]
        result += [f"--{place}={json.dumps(values) if place in lists(cls) else values[0]}"] if values else []
    if bare:
        raise UsageError(f"unexpected argument {bare[0]!r}")
    return result


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The configuration of verb `name` from command-line arguments.

    Raises UsageError naming the field where a key is unknown or a value impossible; `--help` exits with 0.
    """
    parser = parser_for(name)
    cls = getattr(config, VERBS[name].config)
    values = parser.parse_args(normalise(with_recipe_paths(arguments), cls))
    settings = parser.instantiate(values)
    return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status is 0, 1 for a failure, 2 for wrong usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"vitmodel {__version__}")
        return 0
    name, *rest = arguments
    if name not in VERBS:
        print(f"vitmodel: no verb {name!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        settings = parse(name, rest)
        verb = VERBS[name]
        status = getattr(importlib.import_module(verb.module), verb.function)(settings)
        return status if isinstance(status, int) else 0
    except VitmodelError as error:
        print(f"vitmodel {name}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"\nvitmodel {name}: interrupted; what was finished is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
