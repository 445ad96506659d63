"""medseg: medical image segmentation in 2D and 3D. The face: public names only, loaded when first used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.asked import TrainOptions, parse_duration, plan
    from medseg.cases import Case, fold_split
    from medseg.catalogue import weights_file
    from medseg.check import Findings, SeriesFacts, check_dataset, check_series
    from medseg.compare import Comparison, compare
    from medseg.config import (
        Config,
        check_part,
        dump_yaml,
        make_config,
        overlay,
        read_config,
        read_yaml,
        settings_from,
    )
    from medseg.convert import Converted, ConvertOptions, convert
    from medseg.datasets import read_dataset
    from medseg.demo import demo
    from medseg.device import choose_device
    from medseg.errors import (
        CasesError,
        ConfigError,
        DataError,
        GeometryError,
        MedsegError,
        ModelError,
        PeerError,
        TrainingError,
    )
    from medseg.evaluate import EvaluateOptions
    from medseg.export import Exported, export_model
    from medseg.findings import Finding
    from medseg.fingerprint import data_sha256
    from medseg.folder import CaseResult, infer, segment_cases
    from medseg.infer import InferOptions, Segmenter, load_model
    from medseg.inspect import Inspection, inspect_network
    from medseg.leaks import refuse_leaks
    from medseg.networks import at_output_stride, build_network, check_settings, default_config, list_networks
    from medseg.networks.receptive import analyse, fit_width
    from medseg.plan import Plan
    from medseg.pretrained import Pretrained, load_pretrained
    from medseg.process import Preempted
    from medseg.readers import SeriesOptions, file_sha256, stored_in
    from medseg.readers.archive import each_unpacked, is_archive
    from medseg.readers.dicom_facts import DicomFacts, dicom_facts
    from medseg.report import Report, evaluate, report_pairs
    from medseg.shipped import ModelCard, ShippedModel, list_models, make_card, ship_model
    from medseg.statistics import Summary, summarise
    from medseg.told import read_labels, refuse_other_data, told
    from medseg.train import Run, train
    from medseg.writers import write_text
    from medseg.writers.deidentify import Deidentified, DeidentifyOptions, deidentify

_HOME = {
    "Case": "cases",
    "CaseResult": "folder",
    "CasesError": "errors",
    "Comparison": "compare",
    "Config": "config",
    "ConfigError": "errors",
    "ConvertOptions": "convert",
    "Converted": "convert",
    "DataError": "errors",
    "Deidentified": "writers.deidentify",
    "DeidentifyOptions": "writers.deidentify",
    "DicomFacts": "readers.dicom_facts",
    "EvaluateOptions": "evaluate",
    "Exported": "export",
    "Finding": "findings",
    "Findings": "check",
    "GeometryError": "errors",
    "InferOptions": "infer",
    "Inspection": "inspect",
    "MedsegError": "errors",
    "ModelCard": "shipped",
    "ModelError": "errors",
    "PeerError": "errors",
    "Plan": "plan",
    "Preempted": "process",
    "Pretrained": "pretrained",
    "Report": "report",
    "Run": "train",
    "Segmenter": "infer",
    "SeriesFacts": "check",
    "SeriesOptions": "readers",
    "ShippedModel": "shipped",
    "Summary": "statistics",
    "TrainOptions": "asked",
    "TrainingError": "errors",
    "analyse": "networks.receptive",
    "at_output_stride": "networks",
    "build_network": "networks",
    "check_dataset": "check",
    "check_series": "check",
    "check_part": "config",
    "check_settings": "networks",
    "choose_device": "device",
    "compare": "compare",
    "convert": "convert",
    "data_sha256": "fingerprint",
    "default_config": "networks",
    "deidentify": "writers.deidentify",
    "demo": "demo",
    "dicom_facts": "readers.dicom_facts",
    "dump_yaml": "config",
    "each_unpacked": "readers.archive",
    "evaluate": "report",
    "export_model": "export",
    "file_sha256": "readers",
    "fit_width": "networks.receptive",
    "fold_split": "cases",
    "infer": "folder",
    "inspect_network": "inspect",
    "is_archive": "readers.archive",
    "list_models": "shipped",
    "list_networks": "networks",
    "load_model": "infer",
    "load_pretrained": "pretrained",
    "make_card": "shipped",
    "make_config": "config",
    "overlay": "config",
    "parse_duration": "asked",
    "plan": "asked",
    "read_config": "config",
    "read_dataset": "datasets",
    "read_labels": "told",
    "read_yaml": "config",
    "refuse_leaks": "leaks",
    "refuse_other_data": "told",
    "report_pairs": "report",
    "segment_cases": "folder",
    "settings_from": "config",
    "ship_model": "shipped",
    "stored_in": "readers",
    "summarise": "statistics",
    "told": "told",
    "train": "train",
    "weights_file": "catalogue",
    "write_text": "writers",
}

__version__ = "0.1.0"
__all__ = [
    "Case",
    "CaseResult",
    "CasesError",
    "Comparison",
    "Config",
    "ConfigError",
    "ConvertOptions",
    "Converted",
    "DataError",
    "Deidentified",
    "DeidentifyOptions",
    "DicomFacts",
    "EvaluateOptions",
    "Exported",
    "Finding",
    "Findings",
    "GeometryError",
    "InferOptions",
    "Inspection",
    "MedsegError",
    "ModelCard",
    "ModelError",
    "PeerError",
    "Plan",
    "Preempted",
    "Pretrained",
    "Report",
    "Run",
    "Segmenter",
    "SeriesFacts",
    "SeriesOptions",
    "ShippedModel",
    "Summary",
    "TrainOptions",
    "TrainingError",
    "__version__",
    "analyse",
    "at_output_stride",
    "build_network",
    "check_dataset",
    "check_part",
    "check_series",
    "check_settings",
    "choose_device",
    "compare",
    "convert",
    "data_sha256",
    "default_config",
    "deidentify",
    "demo",
    "dicom_facts",
    "dump_yaml",
    "each_unpacked",
    "evaluate",
    "export_model",
    "file_sha256",
    "fit_width",
    "fold_split",
    "infer",
    "inspect_network",
    "is_archive",
    "list_models",
    "list_networks",
    "load_model",
    "load_pretrained",
    "make_card",
    "make_config",
    "overlay",
    "parse_duration",
    "plan",
    "read_config",
    "read_dataset",
    "read_labels",
    "read_yaml",
    "refuse_leaks",
    "refuse_other_data",
    "report_pairs",
    "segment_cases",
    "settings_from",
    "ship_model",
    "stored_in",
    "summarise",
    "told",
    "train",
    "weights_file",
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
