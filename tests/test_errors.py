"""Exceptions derive from one base class, are declared in one module, and can be sent to another process."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitmodel import errors
from vitmodel.pixels.header_meaning import HEADER_RULES
from vitmodel.pixels.verdict import REFUSAL_REASONS
from vitmodel.utils import import_extra

PACKAGE = Path(errors.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
REFUSALS = {"ImageRefusedError", "InputRefusedError"}
CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


def raised_refusals() -> Iterator[tuple[str, ast.Call]]:
    """Yield the file name and the call of every refusal that the package raises."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSALS:
                yield path.name, node


def test_errors_are_declared_in_one_module() -> None:
    names = {cls.__name__ for cls in CLASSES}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and path.name != "errors.py":
                bases = {ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases}
                assert not bases & (names | {"Exception", "ValueError", "RuntimeError"}), f"{path}: {node.name}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_derives_from_the_base_class_and_is_documented(cls: type[Exception]) -> None:
    assert issubclass(cls, errors.VitmodelError)
    assert cls.__name__.endswith("Error")
    assert cls.__doc__


@pytest.mark.parametrize(
    "error",
    [
        errors.UsageError("wrong"),
        errors.ImageRefusedError("blank", "all pixels are 0"),
        errors.InputRefusedError("unreadable", "the zip is encrypted"),
        errors.RequestRefusedError(413, "too large"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_pickles_with_its_attributes(error: errors.VitmodelError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_every_refusal_has_a_documented_reason_code() -> None:
    calls = list(raised_refusals())
    assert len(calls) > 40
    for name, call in calls:
        assert len(call.args) == 2, f"{name}:{call.lineno}"
        code = call.args[0]
        if ast.unparse(code) == "rule.code":  # the codes of a table, which are checked below
            continue
        constants = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
        codes = {value for value in constants if isinstance(value, str)}
        assert codes, f"{name}:{call.lineno}: the code is not a literal"
        assert codes <= set(REFUSAL_REASONS), f"{name}:{call.lineno}"
    assert {rule.code for rule in HEADER_RULES if rule.verdict == "refused"} <= set(REFUSAL_REASONS)


def test_a_missing_extra_is_named_with_the_option_and_the_command_that_installs_it() -> None:
    with pytest.raises(errors.UsageError) as caught:
        import_extra("absent.module", "tune", "trials")
    expected = "trials: needs the extra `tune` (absent is not installed): pip install 'vitmodel[tune]'"
    assert str(caught.value) == expected
