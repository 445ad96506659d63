"""medseg: medical image segmentation in 2D and 3D. The face: public names only, loaded when first used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.cases import fold_split
    from medseg.check import Finding, Findings, check_dataset
    from medseg.compare import Comparison, compare
    from medseg.config import Config, dump_yaml, make_config, read_config, read_labels, settings_from
    from medseg.demo import demo
    from medseg.errors import ConfigError, DataError, GeometryError, MedsegError, ModelError, TrainingError
    from medseg.evaluate import EvaluateOptions
    from medseg.folder import CaseResult, infer
    from medseg.infer import InferOptions, Segmenter, load_model
    from medseg.inspect import Inspection, inspect_network
    from medseg.networks import at_output_stride, build_network, check_settings, default_config, list_networks
    from medseg.networks.receptive import analyse, fit_width
    from medseg.plan import Plan
    from medseg.pretrained import Pretrained, load_pretrained
    from medseg.readers import file_sha256
    from medseg.report import Report, evaluate
    from medseg.statistics import Summary, summarise
    from medseg.train import Run, TrainOptions, parse_duration, plan, train
    from medseg.writers import write_text

_HOME = {
    "CaseResult": "folder",
    "Comparison": "compare",
    "Config": "config",
    "ConfigError": "errors",
    "DataError": "errors",
    "EvaluateOptions": "evaluate",
    "Finding": "check",
    "Findings": "check",
    "GeometryError": "errors",
    "InferOptions": "infer",
    "Inspection": "inspect",
    "MedsegError": "errors",
    "ModelError": "errors",
    "Plan": "plan",
    "Pretrained": "pretrained",
    "Report": "report",
    "Run": "train",
    "Segmenter": "infer",
    "Summary": "statistics",
    "TrainOptions": "train",
    "TrainingError": "errors",
    "analyse": "networks.receptive",
    "at_output_stride": "networks",
    "build_network": "networks",
    "check_dataset": "check",
    "check_settings": "networks",
    "compare": "compare",
    "default_config": "networks",
    "demo": "demo",
    "dump_yaml": "config",
    "evaluate": "report",
    "file_sha256": "readers",
    "fit_width": "networks.receptive",
    "fold_split": "cases",
    "infer": "folder",
    "inspect_network": "inspect",
    "list_networks": "networks",
    "load_model": "infer",
    "load_pretrained": "pretrained",
    "make_config": "config",
    "parse_duration": "train",
    "plan": "train",
    "read_config": "config",
    "read_labels": "config",
    "settings_from": "config",
    "summarise": "statistics",
    "train": "train",
    "write_text": "writers",
}

__version__ = "0.1.0"
__all__ = [
    "CaseResult",
    "Comparison",
    "Config",
    "ConfigError",
    "DataError",
    "EvaluateOptions",
    "Finding",
    "Findings",
    "GeometryError",
    "InferOptions",
    "Inspection",
    "MedsegError",
    "ModelError",
    "Plan",
    "Pretrained",
    "Report",
    "Run",
    "Segmenter",
    "Summary",
    "TrainOptions",
    "TrainingError",
    "__version__",
    "analyse",
    "at_output_stride",
    "build_network",
    "check_dataset",
    "check_settings",
    "compare",
    "default_config",
    "demo",
    "dump_yaml",
    "evaluate",
    "file_sha256",
    "fit_width",
    "fold_split",
    "infer",
    "inspect_network",
    "list_networks",
    "load_model",
    "load_pretrained",
    "make_config",
    "parse_duration",
    "plan",
    "read_config",
    "read_labels",
    "settings_from",
    "summarise",
    "train",
    "write_text",
]


class _Face(ModuleType):
    """A package whose functions `train`, `infer`, `evaluate` … are not hidden by the modules of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system binds a submodule in its package; `import medseg.train` still finds it in sys.modules
        if isinstance(value, ModuleType) and name in _HOME:
            return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'medseg' has no attribute {name!r}")
        value = getattr(import_module(f"medseg.{_HOME[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOME})


sys.modules[__name__].__class__ = _Face
