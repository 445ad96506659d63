"""Data that tests share: small synthetic data sets, and the real ones where they are at hand."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture

if TYPE_CHECKING:
    from browser import Browsing, Visiting
    from playwright.sync_api import Browser

MakeDataset = Callable[..., Path]
# the node is an extra, and needs a newer Python than the rest
HAS_NODE = find_spec("sqlalchemy") is not None and find_spec("pynetdicom") is not None
if HAS_NODE:
    pytest_plugins = ["hospital_peers"]
else:
    collect_ignore_glob = ["test_hospital_*.py"]


def pytest_report_header() -> str:
    """Says at the top where tests are left out."""
    return "" if HAS_NODE else "tests of the hospital node are left out: pip install 'medseg[hospital]'"


@pytest.fixture(scope="session", autouse=True)
def _hears_interruptions() -> None:
    # a shell starts what runs in its background deaf to ctrl-C, and so would be all that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """What a command does to the log ends with the test that runs it."""
    loggers = [logging.getLogger(name) for name in ("medseg", "medseg_pipelines")]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in the same order here and in other processes of the test, and nothing of determinism left for others."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets, from MEDSEG_DATA; skips where there is none."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("MEDSEG_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set MEDSEG_DATA")
    return folder


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> MakeDataset:
    """Makes a data set of bright spheres (label 1) with darker cores (label 2) in noise, and gives its folder.

    `spatial_dims` 3: NIfTI of about (20, 24, 18) voxels, 1 × 1 × 1.5 mm; 2: PNG of about (40, 48). `form`: plain or
    nnunet.
    """
    return partial(_make_dataset, tmp_path)


@dataclass(frozen=True)
class TinyRun:
    """A data set of four cases, and the folder of the run that was trained on it. Shared: read only."""

    dataset: Path
    folder: Path


@pytest.fixture(scope="session")
def tiny_settings() -> tuple[str, ...]:
    """Settings of a 3D network and a loop so small that a training takes a second."""
    return (
        "network.channels=[4,8]",
        "network.aspp_channels=4",
        "network.skip_channels=4",
        "network.decoder_channels=4",
        "windows.patch_size=[16,16,16]",
        "train.batch_size=2",
        "train.steps_per_epoch=2",
    )


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_settings: tuple[str, ...]) -> TinyRun:
    """One epoch on fold 0 of two: a whole run folder whose masks mean nothing."""
    import medseg

    root = tmp_path_factory.mktemp("tiny_run")
    dataset = _make_dataset(root)
    options = medseg.TrainOptions(settings=medseg.settings_from(tiny_settings), folds=2, device="cpu")
    medseg.train(dataset, root / "run", epochs=1, options=options)
    return TinyRun(dataset, root / "run")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, for images of another spacing. Shared: read only."""
    from tiny import tiny_config, tiny_model

    return tiny_model(tmp_path_factory.mktemp("model"), tiny_config(preprocess={"spacing_mm": [1.25, 1.5, 2.0]}))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` with other weights."""
    from tiny import tiny_config, tiny_model

    config = tiny_config(preprocess={"spacing_mm": [1.25, 1.5, 2.0]})
    return tiny_model(tmp_path_factory.mktemp("other"), config, seed=1)


# one browser per file of tests: while Playwright runs, its thread counts as inside an event loop, and a test elsewhere
# could not start one
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser. Skips where there is none; fails there in continuous integration, which must not skip in silence."""
    from browser import EXECUTABLES, find_chromium, launch

    executable = find_chromium()
    if executable is None:
        reason = f"no Chromium on the path ({', '.join(EXECUTABLES)}); install Debian's package `chromium`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with launch(executable) as browser:
        yield browser


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Visiting]:
    """Opens a file: `visit(path, width=1280, dark=False)`. Every page is closed after the test."""
    from browser import Visits

    visits = Visits(chromium)
    yield visits.open
    visits.close()


@pytest.fixture
def browse(chromium: Browser) -> Iterator[Browsing]:
    """Opens an address: `browse(address, width=1280, dark=False)`. Every page is closed after the test."""
    from browser import Visits

    visits = Visits(chromium)
    yield visits.open_address
    visits.close()


def _make_dataset(
    root: Path, *, cases: int = 4, spatial_dims: int = 3, form: str = "plain", seed: int = 0, name: str = "tiny"
) -> Path:
    folder = root / name
    images, labels = ("images", "labels") if form == "plain" else ("imagesTr", "labelsTr")
    ending = ".nii.gz" if spatial_dims == 3 else ".png"
    suffix = "" if form == "plain" else "_0000"
    for sub in (images, labels):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for n in range(cases):
        image, label = _spheres(rng, spatial_dims)
        _save(folder / images / f"case{n}{suffix}{ending}", image)
        _save(folder / labels / f"case{n}{ending}", label)
    if form == "nnunet":
        description = {
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, "shell": 1, "core": 2},
            "numTraining": cases,
            "file_ending": ending,
        }
        (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def _spheres(rng: np.random.Generator, spatial_dims: int) -> tuple[np.ndarray, np.ndarray]:
    base = np.array((20, 24, 18) if spatial_dims == 3 else (40, 48))
    shape = base + rng.integers(-1, 2, spatial_dims)
    centre = shape / 2 + rng.uniform(-2, 2, spatial_dims)
    points = np.stack(np.meshgrid(*[np.arange(s) for s in shape], indexing="ij"), -1)
    distance = np.sqrt(((points - centre) ** 2).sum(-1)) / shape.min()
    label = np.where(distance < 0.16, 2, np.where(distance < 0.33, 1, 0)).astype(np.uint8)
    image = np.array([50.0, 150.0, 100.0])[label] + rng.normal(0, 8, shape)
    return (image.astype(np.float32) if spatial_dims == 3 else image.clip(0, 255).astype(np.uint8)), label


def _save(path: Path, array: np.ndarray) -> None:
    if path.suffix == ".png":
        Picture.fromarray(array).save(path)
    else:
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.5, 1.0])), path)
