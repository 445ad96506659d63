"""medseg: medical image segmentation in 2D and 3D. The face: public names only, loaded when first used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.check import Finding, Findings, check_dataset
    from medseg.config import Config, dump_yaml, make_config, read_config, read_labels, settings_from
    from medseg.demo import demo
    from medseg.errors import ConfigError, DataError, GeometryError, MedsegError, ModelError, TrainingError
    from medseg.infer import CaseResult, InferOptions, Segmenter, infer, load_model
    from medseg.networks import build_network, list_networks
    from medseg.plan import Plan
    from medseg.report import Report, evaluate
    from medseg.train import Run, TrainOptions, plan, train
    from medseg.writers import write_text

_HOME = {
    "CaseResult": "infer",
    "Config": "config",
    "ConfigError": "errors",
    "DataError": "errors",
    "Finding": "check",
    "Findings": "check",
    "GeometryError": "errors",
    "InferOptions": "infer",
    "MedsegError": "errors",
    "ModelError": "errors",
    "Plan": "plan",
    "Report": "report",
    "Run": "train",
    "Segmenter": "infer",
    "TrainOptions": "train",
    "TrainingError": "errors",
    "build_network": "networks",
    "check_dataset": "check",
    "demo": "demo",
    "dump_yaml": "config",
    "evaluate": "report",
    "infer": "infer",
    "list_networks": "networks",
    "load_model": "infer",
    "make_config": "config",
    "plan": "train",
    "read_config": "config",
    "read_labels": "config",
    "settings_from": "config",
    "train": "train",
    "write_text": "writers",
}

__version__ = "0.1.0"
__all__ = [
    "CaseResult",
    "Config",
    "ConfigError",
    "DataError",
    "Finding",
    "Findings",
    "GeometryError",
    "InferOptions",
    "MedsegError",
    "ModelError",
    "Plan",
    "Report",
    "Run",
    "Segmenter",
    "TrainOptions",
    "TrainingError",
    "__version__",
    "build_network",
    "check_dataset",
    "demo",
    "dump_yaml",
    "evaluate",
    "infer",
    "list_networks",
    "load_model",
    "make_config",
    "plan",
    "read_config",
    "read_labels",
    "settings_from",
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
