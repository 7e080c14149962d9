"""Configurations: options are described and checked, options without effect are refused, lists have one spelling."""

from __future__ import annotations

import itertools
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from vitmodel import cli, config
from vitmodel.config import (
    AugmentConfig,
    PredictConfig,
    PredictorConfig,
    PretrainConfig,
    Size,
    TrainConfig,
    TuneConfig,
    make_config,
    options,
    to_command,
    to_yaml,
)
from vitmodel.config.base import merged
from vitmodel.config.options import GROUPS, docstrings, groups_of
from vitmodel.errors import UsageError
from vitmodel.model.architecture import PRESETS
from vitmodel.training.losses import make_loss

CONFIGS = [getattr(config, verb.config) for verb in cli.VERBS.values()]
REQUIRED = {"models": ("a", "b")}
"""Values of required fields for which the field's name is not a valid value."""


def example(cls: type, **values: Any) -> Any:
    """Return a configuration with a value for every required field."""
    required = [option for option in options(cls) if option.required]
    needed = {option.name: REQUIRED.get(option.name, (*option.choices, option.name)[0]) for option in required}
    return cls(**needed | values)


@pytest.mark.parametrize("cls", [*CONFIGS, AugmentConfig], ids=lambda cls: cls.__name__)
def test_every_field_has_a_help_text_and_one_group(cls: type) -> None:
    names = [field.name for field in fields(cls)]
    nested = {name for name in names if is_dataclass(get_type_hints(cls)[name])}
    assert set(docstrings(cls)) >= set(names)
    grouped = [name for group in groups_of(cls).values() for name in group]
    assert sorted(grouped) == sorted(set(names) - nested)
    assert set(groups_of(cls)) <= set(GROUPS)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_every_choice_is_checked_when_made_from_python(cls: type) -> None:
    for option in options(cls):
        if option.choices and "." not in option.name:
            with pytest.raises(
                UsageError, match=f"^{option.name}: 'wrong' is not a choice; choose from {option.choices[0]}"
            ):
                example(cls, **{option.name: ("wrong",) if option.is_list else "wrong"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "5"}, "epochs: must be a whole number"),
        ({"epochs": True}, "epochs: must be a whole number"),
        ({"lr": "fast"}, "lr: must be a number"),
        ({"packed": 1}, "packed: must be true or false"),
        ({"weights": 3}, "weights: must be a path"),
        ({"sources": 3}, "sources: must be a list"),
        ({"augment": {"flip": 0}}, "augment: must be of type AugmentConfig"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_when_made_from_python(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**{"manifest": "m.csv", "run": "run"} | values)


def test_text_becomes_paths_sizes_and_lists() -> None:
    made = TrainConfig(
        manifest="m.csv",  # type: ignore[arg-type]
        run="run",
        weights="w",
        sources="view",  # type: ignore[arg-type]
        auxiliary=["age", "age"],  # type: ignore[arg-type]
    )
    assert (made.manifest, made.run, made.weights) == ((Path("m.csv"),), Path("run"), Path("w"))
    assert (made.sources, made.auxiliary) == (("view",), ("age",))
    for size in ("64x32", (64, 32), Size(64, 32)):
        assert PretrainConfig(run=Path("run"), size=size).size == Size(64, 32)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"size: '64x' is not a size; write HEIGHTxWIDTH"):
        PretrainConfig(run=Path("run"), size="64x")  # type: ignore[arg-type]
    assert PredictorConfig(package="package", ensemble=["a"]).ensemble == (Path("a"),)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ([], ()),
        (["--dicom"], ("sr", "sc")),
        (["--dicom", "true"], ("sr", "sc")),
        (["--dicom", "--jobs", "1"], ("sr", "sc")),
        (["--dicom", "sr,gsps"], ("sr", "gsps")),
        (["--dicom", "gsps", "--dicom", "sr"], ("sr", "gsps")),
        (["--dicom", "--no-dicom"], ()),
        (["--dicom=sr"], ("sr",)),
    ],
)
def test_a_list_that_is_also_a_switch_takes_values_or_none(words: list[str], kinds: tuple[str, ...]) -> None:
    assert cli.parse("predict", [*words, "p", "s", "o"]).dicom == kinds
    assert cli.parse("predict", ["p", "s", "o", *words]).dicom == kinds


def test_a_switch_with_values_takes_a_boolean_from_python_and_refuses_what_has_no_effect(tmp_path: Path) -> None:
    made = {"package": "p", "source": "s", "out": tmp_path / "o"}
    assert PredictConfig(**made, dicom=True).dicom == ("sr", "sc")  # type: ignore[arg-type]
    assert PredictConfig(**made, dicom=False).dicom == ()  # type: ignore[arg-type]
    recipe = tmp_path / "recipe.yaml"
    for text, kinds in (("true", ("sr", "sc")), ("false", ()), ("[gsps, sr]", ("sr", "gsps"))):
        recipe.write_text(f"dicom: {text}\n")
        assert cli.parse("predict", ["--config", str(recipe), "p", "s", "o"]).dicom == kinds
    for kinds in ("sc", "seg", "sr,pm"):
        with pytest.raises(UsageError, match=r"dicom: .* is made from heat maps; add --explain METHOD"):
            PredictConfig(**made, dicom=kinds)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="dicom: 'pdf' is not a choice"):
        PredictConfig(**made, dicom="pdf")  # type: ignore[arg-type]


NO_EFFECT = [
    ("train", ["--segment-overlap", "32"], "segment_overlap", "--segments"),
    ("train", ["--segment-context", "256"], "segment_context", "--segments"),
    ("train", ["--segment-budget", "100"], "segment_budget", "--segments"),
    ("train", ["--segment-top", "4"], "segment_top", "--segments"),
    ("train", ["--segment-samples", "4"], "segment_samples", "--segments"),
    ("train", ["--segments", "128", "--tokens", "100"], "tokens", "--segment-budget"),
    ("train", ["--no-asymmetry"], "asymmetry", "--fusion"),
    ("train", ["--view-dropout", "0.2"], "view_dropout", "--fusion"),
    ("serve", ["--insecure"], "insecure", "--api-key-file"),
    ("serve", ["--user-header", "Remote-User"], "user_header", "--trusted-proxy"),
    ("serve", ["--user-scopes", "admin"], "user_scopes", "--trusted-proxy"),
    ("serve", ["--trusted-proxy", "::1", "--group-header", "Groups"], "group_header", "GROUP=SCOPE"),
    ("train", ["--source-images", "5"], "source_images", "--sources or --fusion"),
    ("train", ["--fusion", "--source-dropout", "0.2"], "source_dropout", "--sources"),
    ("train", ["--auxiliary-weight", "0.2"], "auxiliary_weight", "--auxiliary"),
    ("train", ["--folds", "2", "--patience", "3"], "patience", "a validation split"),
    ("train", ["--folds", "2", "--monitor", "f1"], "monitor", "a validation split"),
    ("train", ["--folds", "2", "--val", "0.3"], "val", "a validation split"),
    ("train", ["--folds", "2", "--test", "0.3"], "test", "a validation split"),
    ("train", ["--sensitivity", "0.8"], "sensitivity", "--objective sensitivity"),
    ("train", ["--strategy", "fsdp"], "strategy", "--devices or --nodes"),
    ("train", ["--augment.hole", "0.3"], "augment.hole", "--augment.holes"),
    ("train", ["--lora", "8"], "lora", "--weights"),
    ("tune", ["--find-lr"], "find_lr", "`vitmodel train`"),
    ("tune", ["--loss", "focal"], "loss", "`vitmodel train`"),
    ("tune", ["--ema", "0.9"], "ema", "`vitmodel train`"),
    ("tune", ["--smoothing", "0.1"], "smoothing", "`vitmodel train`"),
    ("tune", ["--drop-path", "0"], "drop_path", "`vitmodel train`"),
    ("tune", ["--layer-decay", "0.5"], "layer_decay", "`vitmodel train`"),
    ("tune", ["--weight-decay", "0.1"], "weight_decay", "`vitmodel train`"),
    ("tune", ["--augment.elastic", "0.1"], "augment.elastic", "`vitmodel train`"),
    ("pretrain", ["--ratio", "0.5"], "ratio", "--manifest"),
    ("pretrain", ["--manifest", "m", "--phantoms", "10"], "phantoms", "phantoms"),
    ("pretrain", ["--manifest", "m", "--size", "64x32"], "size", "phantoms"),
    ("pretrain", ["--manifest", "m", "--difficulty", "0.1"], "difficulty", "phantoms"),
    ("etl", ["--scheduler", "tcp://host:8786"], "scheduler", "--backend dask"),
    ("predict", ["--deidentify", "seed"], "deidentify", "--dicom"),
    *(
        (verb, ["--runtime", "onnx", *flags], flags[0].strip("-").replace("-", "_"), "--runtime torch")
        for verb in ("predict", "serve", "evaluate")
        for flags in (["--atypical", "0.1"], ["--keep-atypical"])
    ),
    ("compare", ["--level", "image", "--aggregate", "max"], "aggregate", "--level breast"),
    ("node", ["--job", "3"], "job", "the action retry"),
    ("node", ["--tls-key", "k"], "tls_key", "--tls-certificate"),
    ("node", ["--pacs-web", "http://pacs"], "pacs_web", "--destination"),
    ("node", ["--confirm", "qido"], "confirm", "--destination"),
    ("node", ["--identity", "image"], "identity", "--destination"),
    ("node", ["--commitment-seconds", "5"], "commitment_seconds", "--destination"),
    ("node", ["--insecure"], "insecure", "a --host that other machines can reach"),
    ("node", ["--user-header", "Remote-User"], "user_header", "--trusted-proxy"),
    ("node", ["--find-days", "3"], "find_days", "--find"),
    ("node", ["--find-seconds", "10"], "find_seconds", "--find"),
    ("node", ["--user-scopes", "admin"], "user_scopes", "--trusted-proxy"),
    ("node", ["--trusted-proxy", "::1", "--group-header", "Groups"], "group_header", "GROUP=SCOPE"),
    ("node", ["--runtime", "onnx", "--atypical", "0.1"], "atypical", "--runtime torch"),
    ("node", ["--runtime", "onnx", "--keep-atypical"], "keep_atypical", "--runtime torch"),
    ("view", ["--export", "r.csv", "--blind"], "blind", "a run without --export"),
    ("view", ["--export", "r.csv", "--package", "p"], "package", "a run without --export"),
    ("view", ["--export", "r.csv", "--compare", "o"], "compare", "a run without --export"),
    ("export", ["--images", "3"], "images", "--precision int8"),
    ("export", ["--calibration", "m"], "calibration", "--precision int8"),
]
PLACES = {
    "train": "m r",
    "tune": "m r",
    "pretrain": "r",
    "etl": "s o",
    "predict": "p s o",
    "serve": "p",
    "evaluate": "p m o",
    "compare": "a b m",
    "export": "p o",
    "view": "s",
    "node": "run",
}


@pytest.mark.parametrize(
    ("verb", "flags", "named", "needed"), NO_EFFECT, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_option_without_effect_is_refused_and_names_what_it_needs(
    verb: str, flags: list[str], named: str, needed: str
) -> None:
    with pytest.raises(UsageError, match=f"^{named}: has no effect here: it needs .*{needed}"):
        cli.parse(verb, [*PLACES[verb].split(), *flags])


def test_every_declared_need_is_tested() -> None:
    tested = {(verb, named) for verb, _, named, _ in NO_EFFECT}
    tested_with_train = itertools.product(("tune", "pretrain"), merged(TrainConfig, "NEEDS"))
    tested.update(tested_with_train)
    for verb, entry in cli.VERBS.items():
        assert {(verb, name) for name in merged(entry.cls, "NEEDS")} <= tested


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_values_equal_to_the_default_are_always_accepted(cls: type) -> None:
    """A saved recipe contains all values, so it could not be run again otherwise."""
    defaults = {
        option.name: option.default
        for option in options(cls)
        if option.default is not MISSING and "." not in option.name
    }
    assert example(cls, **defaults) == example(cls)


@pytest.mark.parametrize("weights", [None, Path("w")])
def test_a_saved_search_runs_again(weights: Path | None, tmp_path: Path) -> None:
    """The recipe contains the layer decay, which tune searches, as the default that depends on the weights."""
    made = TuneConfig(manifest=(Path("m.csv"),), run=Path("run"), weights=weights)
    recipe = tmp_path / "tune.yaml"
    recipe.write_text(to_yaml("tune", made, recipe))
    assert cli.parse("tune", ["--config", str(recipe)]) == made


@pytest.mark.parametrize(
    "flags",
    [
        ["--sources", "view", "--sources", "machine_id"],
        ["--sources", "view,machine_id"],
        ["--sources=[view, machine_id]"],
        ["--sources", "view, machine_id,view"],
        ["--config", "sources: [view, machine_id]"],
        ["--config", "sources: view,machine_id"],
        ["--config", "sources: '[view,machine_id]'"],
        ["--config", "sources: [site_id]", "--sources", "view", "--sources", "machine_id"],
    ],
)
def test_all_spellings_of_a_list_are_equivalent(flags: list[str], tmp_path: Path) -> None:
    if flags[0] == "--config":
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(flags[1] + "\n")
        flags = ["--config", str(recipe), *flags[2:]]
    assert cli.parse("train", ["m.csv", "run", *flags]).sources == ("view", "machine_id")


def test_an_empty_value_empties_the_list_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sources: age\n")
    assert cli.parse("train", ["m.csv", "run", "--config", str(recipe), "--sources", ""]).sources == ()
    recipe.write_text("sources: []\n")
    assert cli.parse("train", ["m.csv", "run", "--config", str(recipe)]).sources == ()


@pytest.mark.parametrize("verb", ["train", "tune", "leave-out"])
def test_several_manifests_are_written_one_after_another_or_with_commas(verb: str) -> None:
    for line in (
        ["a.csv", "b.csv", "out"],
        ["a.csv,b.csv", "out"],
        ["--manifest", "a.csv", "--manifest", "b.csv", "out"],
    ):
        assert cli.parse(verb, line).manifest == (Path("a.csv"), Path("b.csv"))


def test_a_comma_in_the_name_of_an_existing_file_is_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a, b.csv"
    path.touch()
    assert TrainConfig(manifest=(path,), run=Path("run")).manifest == (path,)
    assert cli.parse("train", [str(path), "run"]).manifest == (path,)


def test_the_command_of_a_configuration_parses_to_the_same_configuration() -> None:
    made = cli.parse(
        "train",
        ["a.csv", "b.csv", "run", "--sources", "view,age", "--no-packed", "--augment.flip", "0", "--lr", "1e-3"],
    )
    verb, *words = to_command("train", made).split()[1:]
    assert cli.parse(verb, words) == made
    other = replace(made, augment=AugmentConfig(holes=2, hole=0.3), folds=3)
    assert cli.parse("train", to_command("train", other).split()[2:]) == other


def test_the_choices_of_model_are_the_presets_of_the_architecture() -> None:
    (model,) = [option for option in options(TrainConfig) if option.name == "model"]
    assert set(model.choices) == {"auto", *PRESETS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, r"^epoch: unknown option; did you mean epochs\?$"),
        ({"augment": {"flips": 1}}, r"^augment.flips: unknown option; did you mean flip\?$"),
        ({"run": "other"}, r"^run: unknown option"),
        ({"qqq": 1}, r"^qqq: unknown option; the options are accumulate, asymmetry, augment, "),
    ],
)
def test_an_option_that_does_not_exist_is_refused_with_similar_or_all_names(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(TrainConfig, options, manifest="m.csv", run="run")


def test_a_mapping_makes_a_nested_configuration() -> None:
    made = make_config(TrainConfig, {"augment": {"flip": 0}}, manifest="m.csv", run="run")
    assert made == TrainConfig(manifest=(Path("m.csv"),), run=Path("run"), augment=AugmentConfig(flip=0))


def test_an_integer_becomes_a_float_in_a_float_field() -> None:
    assert isinstance(TrainConfig(manifest=(Path("m.csv"),), run=Path("run"), clip=2).clip, float)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UsageError, match="loss: 'mse' is not a choice; choose from bce, focal, pf1"):
        make_loss("mse")  # type: ignore[arg-type]
