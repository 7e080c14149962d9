"""One frozen dataclass per stage; a field is a flag and a YAML key, its docstring the --help text. Knows no stage."""

from vitmodel.config.base import Size, plain, require, to_command, to_yaml
from vitmodel.config.images import ETLConfig, Preprocessing, SynthConfig
from vitmodel.config.scoring import (
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    InfoConfig,
    PredictConfig,
    PredictorConfig,
    ServeConfig,
)
from vitmodel.config.training import (
    AugmentConfig,
    IntegrationConfig,
    LeaveOutConfig,
    PretrainConfig,
    SegmentsConfig,
    TrainConfig,
    TrainingConfig,
    TuneConfig,
    VersionsConfig,
)

__all__ = [
    "AugmentConfig",
    "CompareConfig",
    "DemoConfig",
    "ETLConfig",
    "EvaluateConfig",
    "ExportConfig",
    "InfoConfig",
    "IntegrationConfig",
    "LeaveOutConfig",
    "PredictConfig",
    "PredictorConfig",
    "Preprocessing",
    "PretrainConfig",
    "SegmentsConfig",
    "ServeConfig",
    "Size",
    "SynthConfig",
    "TrainConfig",
    "TrainingConfig",
    "TuneConfig",
    "VersionsConfig",
    "plain",
    "require",
    "to_command",
    "to_yaml",
]
