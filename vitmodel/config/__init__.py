"""Options of all verbs: one frozen dataclass per verb.

A field is a flag and a YAML key; its docstring is the help text.
"""

from vitmodel.config.augmentation import AugmentConfig
from vitmodel.config.base import Config, FreezeEpochs, Size, listed, require
from vitmodel.config.images import ETLConfig, Preprocessing, SynthConfig
from vitmodel.config.integration import IntegrationConfig, SegmentsConfig
from vitmodel.config.make import did_you_mean, make_config
from vitmodel.config.node import NodeConfig
from vitmodel.config.options import Option, options
from vitmodel.config.recipe import plain, to_command, to_yaml
from vitmodel.config.scoring import (
    CompareConfig,
    DemoConfig,
    DriftConfig,
    EvaluateConfig,
    ExportConfig,
    InfoConfig,
    PredictConfig,
    PredictorConfig,
    VerifyConfig,
)
from vitmodel.config.serving import KeysConfig, ServeConfig
from vitmodel.config.sharing import PackConfig, PushConfig, RecipesConfig, UnpackConfig, WeightsConfig
from vitmodel.config.studies import LeaveOutConfig, VersionsConfig
from vitmodel.config.training import PretrainConfig, TrainConfig, TrainingConfig, TuneConfig
from vitmodel.config.viewing import ViewConfig

__all__ = [
    "AugmentConfig",
    "CompareConfig",
    "Config",
    "DemoConfig",
    "DriftConfig",
    "ETLConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FreezeEpochs",
    "InfoConfig",
    "IntegrationConfig",
    "KeysConfig",
    "LeaveOutConfig",
    "NodeConfig",
    "Option",
    "PackConfig",
    "PredictConfig",
    "PredictorConfig",
    "Preprocessing",
    "PretrainConfig",
    "PushConfig",
    "RecipesConfig",
    "SegmentsConfig",
    "ServeConfig",
    "Size",
    "SynthConfig",
    "TrainConfig",
    "TrainingConfig",
    "TuneConfig",
    "UnpackConfig",
    "VerifyConfig",
    "VersionsConfig",
    "ViewConfig",
    "WeightsConfig",
    "did_you_mean",
    "listed",
    "make_config",
    "options",
    "plain",
    "require",
    "to_command",
    "to_yaml",
]
