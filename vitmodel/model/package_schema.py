"""The values that config.json of a model package may hold: their types and ranges.

A value that is wrong is refused by its name. Keys that are unknown are left to newer versions; they cannot change
what this version computes.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vitmodel.config import Preprocessing, SegmentsConfig, Size
from vitmodel.config.auxiliary import AuxiliaryTarget
from vitmodel.errors import UsageError
from vitmodel.model.architecture import ExamConfig, NetworkConfig, SourcesConfig, ViTConfig

Rule = Callable[[Any], bool]

LARGEST_COUNT = 10**9
"""Largest whole number that any value may have."""
AGGREGATIONS = ("mean_logit", "fusion", "max", "mean", "noisy_or")
CALIBRATION_PARAMETERS = {
    "temperature": ("temperature",),
    "platt": ("slope", "intercept"),
    "isotonic": ("logits", "probabilities"),
}
TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    Size: "text such as 1024x512",
}


def check_document(document: Mapping[str, Any]) -> NetworkConfig:
    """Check all values of a package's config.json and return its architecture.

    Raises:
        UsageError: A value has the wrong type, lies outside its range or contradicts another; the message names it.
    """
    _check_finite(document, "")
    for name, (words, rule) in TOP_LEVEL.items():
        if name in document:
            _require(rule(document[name]), name, words, document[name])
    architecture = check_architecture(document["architecture"])
    if "preprocessing" in document:
        _check_preprocessing(document["preprocessing"], architecture)
    if "calibration" in document:
        _check_calibration(document["calibration"])
    if "calibration_band" in document:
        _check_calibration_band(document["calibration_band"])
    if "decision" in document:
        _check_decision(document["decision"])
    _check_auxiliary(document.get("auxiliary", {}), architecture)
    _check_records(document)
    return architecture


def check_architecture(values: object) -> NetworkConfig:
    """Return the network configuration that `values` describe.

    Raises:
        UsageError: A value is impossible; the message names it.
    """
    mapping = _mapping(values, "architecture")
    parts = {"sources": SourcesConfig, "exam": ExamConfig, "segments": SegmentsConfig}
    vit = {name: value for name, value in mapping.items() if name not in (*parts, "auxiliary")}
    check_types(ViTConfig, vit, "architecture")
    for name, part in parts.items():
        if mapping.get(name) is not None:
            check_types(part, mapping[name], f"architecture.{name}")
    check_types(tuple[AuxiliaryTarget, ...], mapping.get("auxiliary", []), "architecture.auxiliary")
    try:
        return NetworkConfig.from_dict(dict(mapping))
    except UsageError as error:
        raise UsageError(f"architecture: {str(error).removeprefix('architecture: ')}") from error


def check_types(hint: Any, value: Any, name: str) -> None:
    """Check that a value from JSON has exactly the type of an annotation; nothing is converted.

    Raises:
        UsageError: It has another type. The message gives the name of the value.
    """
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in get_args(hint):
            return
        check_types(next(part for part in get_args(hint) if part is not NoneType), value, name)
    elif origin is Literal:
        words = f"one of {', '.join(map(str, get_args(hint)))}"
        _require(not isinstance(value, bool) and value in get_args(hint), name, words, value)
    elif origin is tuple:
        _require(isinstance(value, list), name, "a list", value)
        for number, item in enumerate(value):
            check_types(get_args(hint)[0], item, f"{name}[{number}]")
    elif is_dataclass(hint):
        mapping = _mapping(value, name)
        hints = get_type_hints(hint)
        for field in fields(hint):
            if field.name in mapping:
                check_types(hints[field.name], mapping[field.name], f"{name}.{field.name}")
    else:
        _require(_has_type(hint, value), name, TYPE_NAMES[hint], value)


def _has_type(hint: Any, value: Any) -> bool:
    """Return whether a value from JSON has a plain type."""
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_COUNT
    if hint is float:
        return _is_number(value)
    if hint is Size and isinstance(value, str):
        try:
            return max(Size.parse(value)) <= LARGEST_COUNT
        except ValueError:
            return False
    return isinstance(value, str) and hint is str


def _is_number(value: Any) -> bool:
    """Return whether a value from JSON is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e300 if isinstance(value, int) else math.isfinite(value)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return _has_type(int, value) and value >= 1


def _is_rising(values: Any, rule: Rule = _is_number) -> bool:
    """Return whether the value is a list of numbers that never decrease, and at least one."""
    if not isinstance(values, list) or not values or not all(map(rule, values)):
        return False
    return all(low <= high for low, high in itertools.pairwise(values))


TOP_LEVEL: Mapping[str, tuple[str, Rule]] = {
    "members": ("a whole number of at least 1", _is_count),
    "label": ("text", lambda value: isinstance(value, str) and bool(value)),
    "packed": ("true or false", lambda value: isinstance(value, bool)),
    "flip": ("true or false", lambda value: isinstance(value, bool)),
    "training": ("text", lambda value: isinstance(value, str)),
    "code_sha256": ("text", lambda value: isinstance(value, str)),
}
"""Key of config.json -> what its value must be, in words and as a function."""


def _require(holds: bool, name: str, words: str, value: object) -> None:
    """Raise UsageError that `name` must be `words`, unless it holds."""
    if not holds:
        shown = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
        raise UsageError(f"{name}: must be {words}, not {shown[:60]}")


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    _require(isinstance(value, dict), name, "a mapping of names to values", value)
    return value  # type: ignore[return-value]


def _check_finite(value: object, name: str) -> None:
    """Raise UsageError if a number anywhere below `value` is NaN or infinite."""
    if isinstance(value, float):
        _require(math.isfinite(value), name, "a finite number", value)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_finite(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_finite(item, f"{name}[{number}]")


def _check_preprocessing(text: object, architecture: NetworkConfig) -> None:
    """Check the preprocessing; its crops must have the size for which the position embeddings were learned."""
    _require(isinstance(text, str), "preprocessing", "one line of JSON as text", text)
    try:
        size = Preprocessing.from_json(str(text)).size
    except UsageError as error:
        raise UsageError(f"preprocessing.{str(error).removeprefix('preprocessing: ')}") from error
    if architecture.segments is None and size != architecture.vit.image_size:
        raise UsageError(
            f"preprocessing.size: {size} differs from architecture.image_size, {Size(*architecture.vit.image_size)}"
        )


def _check_calibration(values: object) -> None:
    calibration = _mapping(values, "calibration")
    method = calibration.get("method")
    known = isinstance(method, str) and method in CALIBRATION_PARAMETERS
    _require(known, "calibration.method", f"one of {', '.join(CALIBRATION_PARAMETERS)}", method)
    _require(
        calibration.get("level", "image") in ("image", "breast"), "calibration.level", "image or breast", "another"
    )
    rules: dict[str, tuple[str, Rule]] = {
        "prevalence": ("a number between 0 and 1", _is_fraction),
        "temperature": ("a number above 0", _is_positive),
        "slope": ("a number above 0", _is_positive),
        "intercept": ("a finite number", _is_number),
        "logits": ("a list of rising numbers", _is_rising),
        "probabilities": (
            "a list of rising numbers between 0 and 1, as long as calibration.logits",
            lambda value: _is_rising(value, _is_fraction) and len(value) == len(calibration.get("logits", ())),
        ),
    }
    for name in ("prevalence", *CALIBRATION_PARAMETERS[str(method)]):
        words, rule = rules[name]
        _require(rule(calibration.get(name)), f"calibration.{name}", words, calibration.get(name))


def _check_calibration_band(values: object) -> None:
    band = _mapping(values, "calibration_band")
    logits = band.get("logits")
    _require(_is_rising(logits), "calibration_band.logits", "a list of rising numbers", logits)
    for name in ("low", "high"):
        limits = band.get(name)
        fits = isinstance(limits, list) and len(limits) == len(band["logits"]) and all(map(_is_fraction, limits))
        words = "a list of numbers between 0 and 1, as long as calibration_band.logits"
        _require(fits, f"calibration_band.{name}", words, limits)
    ordered = all(low <= high for low, high in zip(band["low"], band["high"], strict=True))
    _require(ordered, "calibration_band.low", "at most calibration_band.high", "larger numbers")
    for name in ("patients", "positives"):
        _require(_is_count(band.get(name)), f"calibration_band.{name}", "a whole number of at least 1", band.get(name))


def _check_decision(values: object) -> None:
    decision = _mapping(values, "decision")
    threshold = decision.get("threshold")
    _require(_is_fraction(threshold), "decision.threshold", "a number between 0 and 1", threshold)
    aggregate = decision.get("aggregate")
    known = isinstance(aggregate, str) and aggregate in AGGREGATIONS
    _require(known, "decision.aggregate", f"one of {', '.join(AGGREGATIONS)}", aggregate)
    sensitivity = decision.get("sensitivity")
    _require(sensitivity is None or _is_fraction(sensitivity), "decision.sensitivity", "between 0 and 1", sensitivity)


def _check_auxiliary(values: object, architecture: NetworkConfig) -> None:
    """Check the calibrations of the auxiliary outputs; each needs as many biases as its target has classes."""
    fitted = _mapping(values, "auxiliary")
    targets = {target.name: target for target in architecture.auxiliary}
    for key, calibration in fitted.items():
        name = f"auxiliary.{key}"
        _require(key in targets, name, "an output of the architecture", key)
        if calibration is None:
            continue
        parameters = _mapping(calibration, name)
        slope, biases, units = (parameters.get(part) for part in ("slope", "biases", "units"))
        _require(_is_positive(slope), f"{name}.slope", "a number above 0", slope)
        count = max(2, targets[key].num_outputs)
        fits = isinstance(biases, list) and len(biases) == count and all(map(_is_number, biases))
        _require(fits, f"{name}.biases", f"a list of {count} numbers", biases)
        _require(isinstance(units, int) and _has_type(int, units), f"{name}.units", "a whole number", units)


def _check_records(document: Mapping[str, Any]) -> None:
    """Check what describes the training: it decides no score, but reports read it."""
    for key, points in _mapping(document.get("history", {}), "history").items():
        is_curve = isinstance(points, list) and all(_is_point(point) for point in points)
        _require(is_curve, f"history.{key}", "a list of pairs of an epoch and a number", points)
    _mapping(document.get("versions", {}), "versions")
    origin = _mapping(document.get("fitted_to", {"kind": "", "divisions": 0, "note": ""}), "fitted_to")
    for key, hint in {"kind": str, "divisions": int, "note": str}.items():
        _require(_has_type(hint, origin.get(key)), f"fitted_to.{key}", TYPE_NAMES[hint], origin.get(key))
    data = _mapping(document.get("data", {}), "data")
    for key, counts in _mapping(data.get("splits", {}), "data.splits").items():
        _mapping(counts, f"data.splits.{key}")
    seen = data.get("seen_images", "")
    _require(isinstance(seen, str) and _is_base64(seen), "data.seen_images", "base64", "other text")


def _is_point(point: object) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(part is None or _is_number(part) for part in point)


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return True
