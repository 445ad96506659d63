"""From the files of one case to a label map on their own grid; folders of cases have a room of their own."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from pydantic import ValidationError

from medseg.body import air_of
from medseg.cases import Case
from medseg.catalogue import BEST, find_model
from medseg.config import BACKGROUND, Config, DataConfig, WindowsConfig, overlay
from medseg.device import beyond_memory, choose_device, choose_precision
from medseg.engines import Engine, prepare_network
from medseg.errors import ConfigError, DataError, ModelError
from medseg.metrics.codes import members
from medseg.model import (
    Model,
    check_choices,
    chosen_settings,
    known_mirrored,
    label_table,
    read_best,
    read_model,
)
from medseg.networks import check_patch
from medseg.postprocess import clean, held_by_field, refine
from medseg.preprocess import Prepared, prepare
from medseg.quality import Evidence, QualityModel
from medseg.readers import SeriesOptions, is_series
from medseg.readers.probabilities import Channels
from medseg.readers.segments import SegmentInfo
from medseg.readers.series import choose_series
from medseg.restore import Keeper, Piece, Restorer, decision_of, restore
from medseg.sides import sided_label
from medseg.versions import versions
from medseg.windows import Ensemble, Scorer, assemble, predict, stream, stream_order, views
from medseg.writers.formats import NIFTI, check_formats
from medseg.writers.provenance import Algorithm

log = logging.getLogger(__name__)

# sizes of the image pyramid of `--tta scale`, of those that DeepLab evaluates with
SCALES = (1.0, 0.75, 1.25)
MANY_CHANNELS = 16
# sections of the configuration that decide a mask
DECIDING = {"data", "preprocess", "network", "windows", "postprocess"}


def no_tick(share: float) -> None:
    """Nobody watches how far a case is."""


@dataclass(frozen=True)
class InferOptions:
    """How to infer. `overlap` None: the model's own; `shard` (i, n): every n-th case only, from the i-th of 1…n on.

    `engine`: what runs the network; another than torch is used where it has given what torch gives. `window`: `auto`,
    what was fastest at the best Dice when training ended; `whole`, one pass over the volume; or the voxels of a tile by
    axis. `tta`: `none`, the image alone; `flip`, mirrored copies; `scale`, copies of other sizes too; `auto`, those,
    and copies moved within the network's stride, that held-back cases were not worse with when training ended, beside
    those of the configuration. Other copies are only seen where `settings` ask for them. `series`: which of several
    DICOM series, and whether a tilt or gaps may be resampled. `devices`: cases are dealt to these, in place of
    `device`. For folders of cases: `save_probabilities`, write them beside the masks; `formats`, what is written of
    each case, names of `writers.formats`; `revision`, which attempt at a series DICOM objects are of, from 1: another
    has other UIDs. `settings` are laid over the model's: sections network (`output_stride`, with the weights as they
    are), windows and postprocess. Raises `ConfigError` for a wrong format or revision.
    """

    device: str = "auto"
    devices: tuple[str, ...] = ()
    precision: str = "auto"
    engine: Engine = "torch"
    window: Literal["auto", "whole"] | tuple[int, ...] = "auto"
    tta: Literal["none", "flip", "scale", "auto"] = "auto"
    overlap: float | None = None
    shard: tuple[int, int] = (1, 1)
    overwrite: bool = False
    save_probabilities: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    series: SeriesOptions = field(default_factory=SeriesOptions)
    formats: tuple[str, ...] = (NIFTI,)
    revision: int = 1

    def __post_init__(self) -> None:
        check_formats(self.formats)
        if self.revision < 1:
            raise ConfigError(f"revision {self.revision} found, expected a whole number from 1")


# what may differ between two calls of one loaded model: how its masks are made is settled
FREE_OPTIONS = ("shard", "overwrite", "save_probabilities", "series", "formats", "revision")


@dataclass(frozen=True)
class Segmented:
    """What became of a case: `labels` (I, J[, K]) uint8 or uint16 on the file's grid, and what is thought of them.

    `quality`: for each label its `expected` Dice and the interval `low` to `high` of it, empty where the model knows
    none; `warnings`: what a reader of the mask should know, in words; `look`: whether somebody should look at it.
    """

    labels: np.ndarray[Any, np.dtype[Any]]
    quality: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    look: bool = False


class Segmenter:
    """One model, or several as an ensemble (their probabilities are averaged), ready on a device."""

    def __init__(self, models: Sequence[Model], options: InferOptions | None = None) -> None:
        self.options = options or InferOptions()
        if self.options.tta not in ("none", "flip", "scale", "auto"):
            raise ConfigError(f"tta {self.options.tta!r}: expected none, flip, scale or auto")
        self.models = tuple(models)
        config = _common_config(self.models)
        mirrored = known_mirrored([model.config for model in self.models])
        self.config = config.model_copy(update={"windows": _windows(config, self.options, mirrored)})
        self.device = choose_device(self.options.device)
        self.precision = choose_precision(self.options.precision, self.device)
        # of an ensemble, what the first of its models knows
        self._quality = read_quality(self.models[0])
        for model in self.models:
            _check_windows(model, self.config.windows)
        self._scorers = tuple(
            make_scorer(m.network, self.config.data, self.device, self.precision, self.options.engine)
            for m in self.models
        )

    @property
    def label_names(self) -> dict[int, str]:
        """Name of every value in the label maps."""
        return self.models[0].label_names

    @property
    def segments(self) -> tuple[SegmentInfo, ...]:
        """Value, name and colour of every label."""
        return tuple(SegmentInfo(**label) for label in label_table(self.config.data))

    @cached_property
    def algorithm(self) -> Algorithm:
        """What DICOM objects say of who made them: the weights of all models, and all else that decides a mask."""
        first, count = self.models[0], len(self.models)
        name = str(first.description.get("card", {}).get("title") or f"medseg {first.config.network.name}")
        weights = [model.sha256 for model in self.models]
        described = [dict(model.description) for model in self.models]
        return Algorithm(
            name if count == 1 else f"{name}, ensemble of {count}",
            versions("medseg")["medseg"],
            weights[0] if count == 1 else text_sha256("\n".join(weights)),
            text_sha256(json.dumps([self.config_sha256, described], sort_keys=True)),
        )

    @property
    def config_sha256(self) -> str:
        """SHA-256 of the sections of the configuration that decide a mask, as this run has them."""
        return text_sha256(self.config.model_dump_json(include=DECIDING))

    def with_options(self, options: InferOptions) -> Segmenter:
        """The same loaded model under other `options`, which may differ in `FREE_OPTIONS`.

        `segmenter.with_options(replace(segmenter.options, revision=2))`. Raises `ConfigError` for any other difference:
        that needs `load_model`.
        """
        changed = [f.name for f in fields(options) if getattr(options, f.name) != getattr(self.options, f.name)]
        fixed = [name for name in changed if name not in FREE_OPTIONS]
        if fixed:
            raise ConfigError(
                f"{', '.join(fixed)} changed of a loaded model, expected only {', '.join(FREE_OPTIONS)}; "
                "load it again with these options"
            )
        made = copy(self)
        made.options = options
        return made

    def segment(self, *files: str | Path) -> MetaTensor:
        """Label map (I, J[, K]) uint8 (uint16 above 255) of one case on its own grid; several files are its channels.

        For one folder, archive or file of DICOM `options.series` holds. Raises `DataError` or `GeometryError` naming
        the file.
        """
        if not files:
            raise ConfigError("no file given, expected one, or one for each channel")
        for file in files:
            if not isinstance(file, (str, os.PathLike)):
                raise ConfigError(
                    f"{type(file).__name__} given, expected the path of a file, whose header tells where its voxels "
                    "lie, or one for each channel: segment(a, b); write an image in memory to a file first"
                )
        paths = tuple(Path(f) for f in files)
        series = choose_series(paths[0], self.options.series) if len(paths) == 1 and is_series(paths[0]) else None
        prepared = self.prepare(Case(paths[0].name, paths, None, paths[0].name, series=series))
        found = self.segment_prepared(prepared)
        for warning in (*prepared.notes, *found.warnings):
            log.warning("%s: %s", prepared.id, warning)
        return MetaTensor(torch.as_tensor(found.labels), affine=torch.as_tensor(prepared.source.affine_4x4))

    def prepare(self, case: Case) -> Prepared:
        """Read a case and bring it to the network's grid; may run in another thread. Raises `DataError`."""
        return prepare(case, self.config.preprocess, self.config.data, with_label=False)

    @property
    def channels(self) -> Channels:
        """What the channels of the scores stand for in a label file."""
        data = self.config.data
        if data.is_regions:
            values = [data.labels[name] for name in data.foreground]
            return Channels(data.foreground, tuple(map(members, values)), regions=True)
        return Channels((BACKGROUND, *data.foreground), data.out_values)

    def segment_prepared(
        self,
        prepared: Prepared,
        seconds: dict[str, float] | None = None,
        *,
        tick: Callable[[float], None] = no_tick,
        keep: Keeper | None = None,
    ) -> Segmented:
        """Label map of a prepared case on the grid of its file.

        `seconds` takes the time by stage. `tick` is called between two batches of windows with the share of the case
        that is done, 0–1; what it raises drops the case. `keep` gets the probabilities, as they are before the
        mask is cleaned; after a random field, where there is one. Raises `DataError` naming the case where the network
        gives NaN.
        """
        seconds = {} if seconds is None else seconds
        decision, evidence = decision_of(self.config.data), Evidence(self.config.data)
        pieces = self._pieces(prepared, evidence, seconds, tick)
        if self.config.postprocess.crf:
            refined = self._refined(pieces, prepared, seconds)
            labels = restore(refined, prepared.grid, prepared.source, decision, keep=keep)
        else:
            order = stream_order(self.config.windows, prepared.grid.shape)
            restorer = Restorer(prepared.grid, prepared.source, decision, order=order, keep=keep)
            for piece in pieces:
                with timed(seconds, "restore"):
                    restorer.add(piece)
            labels = restorer.labels
        with timed(seconds, "postprocess"):
            cleaned = clean(
                self.config.postprocess,
                labels.numpy(),
                {name: value for value, name in self.label_names.items()},
                voxel_mm3=prepared.source.voxel_mm3,
            )
        if self._quality is None:
            return Segmented(cleaned)
        with timed(seconds, "quality"):
            found = self._quality.assess(prepared, evidence)
        return Segmented(cleaned, {name: asdict(e) for name, e in found.estimates.items()}, found.warnings, found.look)

    def scores(self, image: torch.Tensor) -> torch.Tensor:
        """Probabilities (K, *S) of a prepared image (C, *S), all at once."""
        return predict(
            self.config.windows, image, Ensemble(self._scorers, views(self.config.windows)), device=self.device
        )

    def _pieces(
        self, prepared: Prepared, evidence: Evidence, seconds: dict[str, float], tick: Callable[[float], None]
    ) -> Iterator[Piece]:
        """Final scores of a case piece by piece; `seconds` takes the time, `evidence` what they say of themselves."""
        windows = self.config.windows
        ensemble = Ensemble(self._scorers, views(windows), evidence.add_members if self._knows_members() else None)
        with timed(seconds, "network"):
            air = air_of(windows, self.config.data, self.config.preprocess, prepared.image)
        channels = self.config.data.out_channels
        pieces = stream(
            windows, prepared.image, ensemble, device=self.device, out_channels=channels, air=air, tick=tick
        )
        while True:
            with timed(seconds, "network"):
                try:
                    piece = next(pieces, None)
                except DataError as error:
                    raise DataError(f"{prepared.id}: {error}") from error
            if piece is None:
                return
            if self._quality is not None:
                with timed(seconds, "quality"):
                    evidence.add_piece(piece, prepared.image)
            yield piece

    def _knows_members(self) -> bool:
        """Whether the copies of this run are those whose agreement the estimate of Dice has learnt to read."""
        windows = self.config.windows
        learnt = self.models[0].description.get("inference", {}).get("quality", {}).get("flip_axes")
        plain = windows.scales == (1.0,) and not windows.shifts
        alike = len(self.models) == 1 and plain and list(windows.flip_axes) == learnt
        return alike and bool(learnt)

    def _refined(self, pieces: Iterator[Piece], prepared: Prepared, seconds: dict[str, float]) -> torch.Tensor:
        """Scores (K, *S) after the random field, which needs all of them at once.

        Raises `MemoryError`, before the network runs, where this machine cannot hold what that takes.
        """
        channels, voxels = self.config.data.out_channels, math.prod(prepared.grid.shape)
        # a GPU tells by itself when its memory is full; what the field makes there comes to this machine's
        held = held_by_field(channels, len(prepared.image)) if self.device.type == "cpu" else channels
        if taken := beyond_memory(held * voxels):
            raise MemoryError(
                f"{prepared.id}: postprocess.crf on {channels} scores of {voxels:,} voxels takes {taken}; leave it out"
            )
        scores = assemble(pieces, prepared.grid.shape, self.device)
        with timed(seconds, "postprocess"):
            return refine(
                self.config.postprocess,
                scores,
                prepared.image,
                spacing_mm=prepared.grid.spacing_mm,
                regions=self.config.data.is_regions,
            ).cpu()


def read_quality(model: Model) -> QualityModel | None:
    """What calibration stored with a model for the estimate of Dice, if anything. Raises `ModelError`."""
    stored = model.description.get("inference", {}).get("quality", {}).get("model")
    if stored is None:
        return None
    try:
        return QualityModel.model_validate(stored)
    except ValidationError as error:
        raise ModelError(
            f"model.json: `inference.quality` is damaged ({error.error_count()} errors); copy it again"
        ) from error


def load_model(*folders: str | Path, options: InferOptions | None = None) -> Segmenter:
    """The model that `medseg train` wrote into a folder; several folders make an ensemble. Raises `ModelError`.

    A name of `medseg.list_models()` stands for that model, unless a folder of that name holds one; the folder of a
    cross-validation, given alone, for the models and settings that it chose.

    What calibration chose for it on held-back cases is used unless `options` say otherwise.
    """
    options = options or InferOptions()
    paths = [find_model(folder) for folder in folders]
    paths, options = _chosen_by_crossval(paths, options)
    chosen = chosen_settings(paths, _wanted_choices(options))
    for path in paths:
        check_choices(path, chosen)
    settings = overlay(chosen, options.settings)
    return Segmenter([read_model(path, settings) for path in paths], options)


def _chosen_by_crossval(paths: list[Path], options: InferOptions) -> tuple[list[Path], InferOptions]:
    """The models that a cross-validation chose, its settings under those of `options`; else both as they are."""
    found = {path: best for path in paths if (best := read_best(path)) is not None}
    if not found:
        return paths, options
    if len(paths) > 1:
        # what was chosen for some models was not judged with others
        raise ModelError(
            f"{next(iter(found))}: holds the choice of a cross-validation; give it alone, or its run folders"
        )
    ((folder, best),) = found.items()
    models = [folder / model for model in best.models]
    for model in models:
        check_choices(model, best.settings, f"{folder / BEST}: `settings`")
    return models, replace(options, settings=overlay(best.settings, options.settings))


def _check_windows(model: Model, windows: WindowsConfig) -> None:
    """Raises `ConfigError` where a window, or a copy of it of another size, is too small for the network."""
    tile = windows.tile_size or windows.patch_size
    for scale in windows.scales:
        check_patch(model.network, model.config.network, tuple(max(1, round(n * scale)) for n in tile))


def _wanted_choices(options: InferOptions) -> list[str]:
    """The choices of calibration that `options` leave open."""
    given = options.settings.get("windows", {})
    cut = {"mode", "overlap", "tile_size", "halo"} & set(given)
    names = ["windows"] if options.window == "auto" and options.overlap is None and not cut else []
    names += ["tta"] if options.tta == "auto" else []
    return names if "postprocess" in options.settings else [*names, "postprocess"]


def make_scorer(
    network: torch.nn.Module, data: DataConfig, device: torch.device, precision: str, engine: Engine = "torch"
) -> Scorer:
    """Windows (B, C, *S) → probabilities (B, K, *S) float32."""
    run = prepare_network(engine, network, data=data, device=device, precision=precision)

    @torch.inference_mode()
    def score(windows: torch.Tensor) -> torch.Tensor:
        logits = run(windows)
        if data.is_regions:
            return logits.float().sigmoid()
        # over few channels the softmax is fastest plane by plane, over many where they lie together in memory
        if logits.shape[1] < MANY_CHANNELS:
            return logits.to(torch.float32, memory_format=torch.contiguous_format).softmax(dim=1)
        return logits.movedim(1, -1).float().softmax(dim=-1).movedim(-1, 1)

    return score


def _windows(config: Config, options: InferOptions, mirrored: tuple[int, ...]) -> WindowsConfig:
    """How this model cuts volumes, with what the options ask for laid over."""
    changes: dict[str, Any] = {}
    if options.overlap is not None:
        if not 0 <= options.overlap < 1:
            raise ConfigError(f"--overlap {options.overlap}: expected a number from 0 to below 1")
        changes |= {"mode": "blend", "overlap": options.overlap}
    if options.window == "whole" and options.overlap is not None:
        raise ConfigError("--overlap: a whole volume has none; leave out --overlap, or --window whole")
    if options.window == "whole":
        changes |= {"mode": "whole"}
    elif options.window != "auto":
        dims = config.data.spatial_dims
        if len(options.window) != dims:
            raise ConfigError(f"--window: {len(options.window)} numbers found, expected {dims}, or auto or whole")
        changes |= {"mode": "blend", "tile_size": tuple(options.window)}
    if options.tta != "auto":
        # what is asked for, and not what the configuration has beside
        given = options.settings.get("windows", {})
        without = {"flip_axes": (), "shifts": (), "scales": (1.0,)}
        changes |= {key: value for key, value in without.items() if key not in given}
    if options.tta in ("flip", "scale"):
        # mirrored, a left kidney is a right one: whatever the configuration says
        sided = sided_label(config.data)
        axes = () if sided else mirrored
        if not axes:
            why = f"label `{sided}` tells sides apart" if sided else "it has learnt from none"
            log.warning("--tta %s: the model sees no mirrored copies, %s", options.tta, why)
        changes |= {"flip_axes": axes}
    if options.tta == "scale":
        changes |= {"scales": SCALES}
    try:
        return WindowsConfig.model_validate(config.windows.model_dump() | changes)
    except ValidationError as error:
        found = ", ".join(str(e["input"]) for e in error.errors())
        raise ConfigError(f"--window: {found} found, expected whole numbers from 1") from error


def _common_config(models: Sequence[Model]) -> Config:
    if not models:
        raise ConfigError("no model given; use -m RUN")
    first = models[0].config
    for model in models[1:]:
        for section in ("data", "preprocess", "windows", "postprocess"):
            # as text: the order of the labels is the order of the channels, and equal mappings may differ in it
            if getattr(model.config, section).model_dump_json() != getattr(first, section).model_dump_json():
                raise ModelError(f"the models of an ensemble differ in `{section}`; train them with one configuration")
    return first


def text_sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds that the block took to `seconds` under `stage`."""
    start = time.perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 6)
