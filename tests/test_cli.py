"""The command line: flags are YAML keys, usage errors name the field, help is light, and stages run as files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from vitmodel import __version__, cli, config
from vitmodel.config import ETLConfig, Size, TrainConfig, to_yaml
from vitmodel.model.architecture import PRESETS
from vitmodel.model.tiles import check_segments

ROOT = Path(__file__).resolve().parents[1]


def test_a_flag_reaches_its_field() -> None:
    settings = cli.parse(
        "train", ["m.csv", "--drop-path", "0.5", "run", "--no-packed", "--auxiliary=[density,age]", "--augment.flip=0", "--resume"]
    )
    assert settings == TrainConfig(
        manifest=Path("m.csv"),
        run=Path("run"),
        drop_path=0.5,
        packed=False,
        auxiliary=("density", "age"),
        resume=True,
        augment=config.AugmentConfig(flip=0),
    )


def test_weights_change_the_default_recipe_and_flags_override_it() -> None:
    def recipe(*more: str) -> tuple[float | bool | None, ...]:
        settings = cli.parse("train", ["m.csv", "run", *more])
        return tuple(getattr(settings, name) for name in ("epochs", "lr", "layer_decay", "batch_size", "freeze", "flip_average"))

    scratch, given = (30, 3e-4, 1, 32, 0, False), (6, 1e-4, 0.75, 16, 1, True)
    assert recipe() == scratch
    assert recipe("--weights", "w") == recipe("--weights", "w", "--config", str(ROOT / "configs" / "rsna.yaml")) == given
    flags = ["--epochs", "30", "--lr", "3e-4", "--layer-decay", "1", "--batch-size", "32", "--freeze", "0", "--no-flip-average"]
    assert recipe("--weights", "w", *flags) == scratch


def test_a_list_field_takes_the_remaining_positional_arguments_and_repeated_flags() -> None:
    settings = cli.parse("predict", ["package", "a.dcm", "--ensemble", "second", "-", "b c", "out", "--ensemble=third", "--flip"])
    assert settings == config.PredictConfig(
        package=Path("package"), source=["a.dcm", "-", "b c"], out=Path("out"), ensemble=[Path("second"), Path("third")], flip=True
    )


def test_a_positional_field_set_by_its_flag_takes_no_positional_argument() -> None:
    for line in (
        ["a.csv", "run/package", "m.csv"],
        ["a.csv", "run/package", "--manifest", "m.csv"],
        ["--manifest=m.csv", "a.csv", "run/package"],
    ):
        settings = cli.parse("compare", line)
        assert (settings.models, settings.manifest) == ([Path("a.csv"), Path("run/package")], Path("m.csv"))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_saved_configuration_parses_to_itself(verb: str, tmp_path: Path) -> None:
    """All flags are YAML keys: what a stage saves gives the same configuration again."""
    cls = getattr(config, cli.VERBS[verb].config)
    values = {"list[str]": ["here", "there"], "list[Path]": [Path("here"), Path("there")]}
    settings = cls(**{each.name: values.get(str(each.type), Path(each.name)) for each in fields(cls) if each.name in cli.positionals(cls)})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(verb, settings, recipe))
    assert cli.parse(verb, ["--config", str(recipe)]) == settings


@pytest.mark.parametrize(
    "recipe", sorted(set((ROOT / "configs").rglob("*.yaml")) - {ROOT / "configs" / "sweep.yaml"}), ids=lambda path: path.name
)
def test_every_shipped_recipe_parses_with_the_command_in_its_first_line(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    head, *_ = recipe.read_text().splitlines()
    assert head.startswith("# vitmodel ")
    verb, *arguments = head.removeprefix("# vitmodel ").split()
    assert str(recipe.relative_to(ROOT)) in arguments
    settings = cli.parse(verb, arguments)
    if settings.segments:
        preset = PRESETS[settings.model]
        check_segments(settings.segmenting, preset.patch, preset.prefix)


def test_a_flag_after_the_recipe_overrides_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("size: 64x32\nbits: 16\n")
    settings = cli.parse("etl", ["in", "out", "--config", str(recipe), "--bits", "8"])
    assert settings == replace(ETLConfig(source=Path("in"), out=Path("out")), size=Size(64, 32))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["etl", "in"], "out"),
        (["etl", "in", "out", "third"], "third"),
        (["etl", "in", "out", "--siz", "64"], "--siz"),
        (["etl", "in", "out", "--size", "64x"], "64x"),
        (["etl", "in", "out", "--bits", "12"], "bits"),
        (["etl", "in", "out", "--jobs", "-1"], "jobs"),
        (["train", "m", "run", "--epochs", "0"], "epochs"),
        (["train", "m", "run", "--augment.flip", "2"], "augment.flip"),
        (["evaluate", "p", "m", "out", "--replicates", "1"], "replicates"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_usage_ends_with_2_and_names_the_field(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert named in capsys.readouterr().err


def test_an_unknown_key_in_a_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sizze: 64x32\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["etl", "in", "out", "--config", str(recipe)])
    assert end.value.code == 2
    assert "sizze" in capsys.readouterr().err


def test_help_shows_each_fields_docstring() -> None:
    """That it imports nothing heavy is checked in test_layers."""
    shown = subprocess.run([sys.executable, "-m", "vitmodel.cli", "train", "--help"], capture_output=True, text=True, check=True).stdout
    assert "Peak learning rate;" in shown


def test_version() -> None:
    shown = subprocess.run([sys.executable, "-m", "vitmodel.cli", "--version"], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == f"vitmodel {__version__}"


@pytest.mark.parametrize("stage", ["image_ETL", "train", "evaluate", "predict", "info"])
def test_a_stage_runs_as_a_file_from_an_uninstalled_checkout(stage: str, tmp_path: Path) -> None:
    """The copy's own configuration answers, not the installed package's."""
    checkout = tmp_path / "checkout" / "vitmodel"
    shutil.copytree(ROOT / "vitmodel", checkout, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (checkout / "config").glob("*.py"):
        path.write_text(re.sub(r"class (\w+Config)(.*):\n    \"\"\"", r'class \1\2:\n    """The copy. ', path.read_text()))
    done = subprocess.run([sys.executable, checkout / f"{stage}.py", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "The copy." in done.stdout
