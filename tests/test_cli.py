"""The command line: flags are YAML keys, usage errors name the field, --help is light, and stages run as files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vitmodel import __version__, cli, config
from vitmodel.config import ETLConfig, Size, TrainConfig, options, to_yaml
from vitmodel.model.architecture import PRESETS
from vitmodel.model.segments import check_segments

ROOT = Path(__file__).resolve().parents[1]


def test_a_flag_reaches_its_field() -> None:
    settings = cli.parse(
        "train",
        [
            "m.csv",
            "--drop-path",
            "0.5",
            "run",
            "--no-packed",
            "--auxiliary=[density,age]",
            "--augment.flip=0",
            "--resume",
        ],
    )
    assert settings == TrainConfig(
        manifest=(Path("m.csv"),),
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
        return tuple(
            getattr(settings, name) for name in ("epochs", "lr", "layer_decay", "batch_size", "freeze", "flip_average")
        )

    scratch = (30, 3e-4, 1, 32, 0, False)
    fine_tuning = (6, 1e-4, 0.75, 16, 1, True)
    assert recipe() == scratch
    assert recipe("--weights", "w") == recipe("--weights", "w", "--config", "rsna") == fine_tuning
    flags = [
        "--epochs",
        "30",
        "--lr",
        "3e-4",
        "--layer-decay",
        "1",
        "--batch-size",
        "32",
        "--freeze",
        "0",
        "--no-flip-average",
    ]
    assert recipe("--weights", "w", *flags) == scratch


def test_a_list_field_takes_the_remaining_positional_arguments_and_repeated_flags() -> None:
    settings = cli.parse(
        "predict", ["package", "a.dcm", "--ensemble", "second", "-", "b c", "out", "--ensemble=third", "--flip"]
    )
    assert settings == config.PredictConfig(
        package=Path("package"),
        source=("a.dcm", "-", "b c"),
        out=Path("out"),
        ensemble=(Path("second"), Path("third")),
        flip=True,
    )


def test_a_positional_field_set_by_its_flag_takes_no_positional_argument() -> None:
    for line in (
        ["a.csv", "run/package", "m.csv"],
        ["a.csv", "run/package", "--manifest", "m.csv"],
        ["--manifest=m.csv", "a.csv", "run/package"],
    ):
        settings = cli.parse("compare", line)
        assert (settings.models, settings.manifest) == ((Path("a.csv"), Path("run/package")), Path("m.csv"))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_saved_configuration_parses_to_itself(verb: str, tmp_path: Path) -> None:
    """All flags are YAML keys: the recipe that a stage saves gives the same configuration again."""
    cls = cli.VERBS[verb].cls
    values = {
        option.name: ("here", "there") if option.is_list else (*option.choices, option.name)[0]
        for option in options(cls)
        if option.required
    }
    settings = cls(**values)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(verb, settings, recipe))
    assert cli.parse(verb, ["--config", str(recipe)]) == settings


@pytest.mark.parametrize("recipe", sorted((ROOT / "vitmodel" / "recipes").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_parses_with_the_command_in_its_first_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    head, *_ = recipe.read_text().splitlines()
    assert head.startswith("# vitmodel ")
    verb, *arguments = head.removeprefix("# vitmodel ").split()
    name = recipe.relative_to(ROOT / "vitmodel" / "recipes").with_suffix("").as_posix()
    assert arguments[arguments.index("--config") + 1] == name
    settings = cli.parse(verb, arguments)
    if settings.segments:
        preset = PRESETS[settings.model]
        check_segments(settings.segmenting, preset.patch, preset.num_prefix_tokens)


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
        (["etl", "in", "out", "--workers", "-1"], "workers"),
        (["train", "m", "run", "--epochs", "0"], "epochs"),
        (["train", "m", "run", "--augment.flip", "2"], "augment.flip"),
        (["evaluate", "p", "m", "out", "--replicates", "1"], "replicates"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_field(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert named in capsys.readouterr().err


def test_an_unknown_key_in_a_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sizze: 64x32\n")
    assert cli.main(["etl", "in", "out", "--config", str(recipe)]) == 2
    assert "sizze: unknown option; did you mean size?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["etl", "in", "out", "--siz", "64"], "--siz: unknown option; did you mean --size?"),
        (["etl", "in", "out", "--mm_per_pixl=1"], "--mm_per_pixl: unknown option; did you mean --mm-per-pixel?"),
        (["trian", "m", "run"], "unknown verb 'trian'; did you mean train?"),
        (["etl", "in", "out", "--jobs", "x"], "workers: must be a whole number, not 'x'"),
        (["etl", "in", "out", "--mm-per-pixel", "x"], "mm_per_pixel: must be a number, not 'x'"),
        (["etl", "in"], "out: is missing; usage: vitmodel etl SOURCE OUT"),
        (["etl", "in", "out", "--size"], "--size: needs a value"),
        (["train", "m", "run", "--resume=maybe"], "resume: must be true or false, not 'maybe'"),
        (["train", "m", "run", "--augment", "3"], "--augment: '3' is not a mapping"),
    ],
)
def test_wrong_usage_is_explained_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_flags_are_written_with_dashes_or_underscores_and_groups_as_a_mapping() -> None:
    dashes, underscores = (
        cli.parse("train", ["m", "run", flag, "0.2", "--augment", "{flip: 0, holes: 2}"])
        for flag in ("--drop-path", "--drop_path")
    )
    assert dashes == underscores
    assert dashes.augment == config.AugmentConfig(flip=0, holes=2)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_shows_every_option_once_without_python_types(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 100
    for noise in ("Literal", "<class", "Path'", "null", "None", "type:"):
        assert noise not in shown
    lines = [line.split()[0] for line in shown.splitlines() if re.match(r"  \S", line)]
    for option in options(cli.VERBS[verb].cls):
        switch = f"{option.flag},"  # followed by its negation
        flag = switch if option.hint is bool else option.flag
        assert lines.count(option.placeholder.split()[0] if option.required else flag) == 1
        assert option.group in cli.GROUPS


def test_help_shows_the_defaults_that_depend_on_weights() -> None:
    shown = " ".join(cli.verb_help("train").split())
    assert "(default: 6 with --weights, else 30)" in shown
    assert "(default: -1)" not in shown
    assert "(default: 30)" in " ".join(cli.verb_help("pretrain").split())


def test_help_shows_the_fields_docstrings_and_imports_no_heavy_module() -> None:
    code = """
import contextlib, sys
from vitmodel.cli import main
with contextlib.suppress(SystemExit):
    main(["train", "--help"])
print("imported:", *sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    text, _, modules = shown.partition("imported:")
    assert "Peak learning rate" in text
    assert "vitmodel.config.training" in modules.split()
    assert not set(modules.split()) & {
        "torch",
        "numpy",
        "pandas",
        "scipy",
        "lightning",
        "cv2",
        "pydicom",
        "sklearn",
        "matplotlib",
    }


def test_the_overview_lists_every_verb_below_a_heading() -> None:
    shown = cli.help_text()
    for name, verb in cli.VERBS.items():
        assert re.search(rf"^  {name} ", shown, re.MULTILINE)
        assert f"\n{verb.group}:\n" in shown
    assert max(len(line) for line in shown.splitlines()[1:]) <= 100


@pytest.mark.parametrize("module", ["vitmodel", "vitmodel.cli"])
def test_the_version_is_printed(module: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == f"vitmodel {__version__}"


@pytest.mark.parametrize("stage", ["image_ETL", "train", "predict"])
def test_a_stage_runs_as_a_file_from_an_uninstalled_checkout(stage: str, tmp_path: Path) -> None:
    """The configuration is that of the copy, not of the installed package."""
    checkout = tmp_path / "checkout" / "vitmodel"
    shutil.copytree(ROOT / "vitmodel", checkout, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (checkout / "config").glob("*.py"):
        path.write_text(
            re.sub(r"class (\w+Config)(.*):\n    \"\"\"", r'class \1\2:\n    """The copy. ', path.read_text())
        )
    done = subprocess.run(
        [sys.executable, checkout / f"{stage}.py", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "The copy." in done.stdout
