"""The wheel that `pip install` makes: complete, and at work far from the sources; what it does is tested elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sources without a network: the build back end is at hand."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("medseg-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the wheel, and sees only the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inside = Path(
        subprocess.run([interpreter, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(inside)
    # a path file adds the folder itself, not the path files in it: the editable medseg of this environment stays out
    (inside / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def test_the_wheel_holds_code_templates_and_sample_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        # what ships of trained models has a limit of its own
        size = sum(i.compress_size for i in archive.infolist() if not i.filename.endswith(".safetensors"))
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "medseg").rglob("*") if p.is_file()}
    pipelines = (p.relative_to(ROOT / "pipelines") for p in (ROOT / "pipelines").rglob("*") if p.is_file())
    sources |= {f"medseg_pipelines/{p}" for p in pipelines}
    assert {s for s in sources if "__pycache__" not in s} <= names
    assert size < 5e6
    assert not any(n.startswith(("tests/", "configs/", "pipelines/", ".")) for n in names)


@pytest.fixture
def medseg(python: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs the installed `medseg` in an empty folder, where no sources are; what it prints."""

    def call(*arguments: str) -> str:
        return output_of([str(python), "-m", "medseg", *arguments], tmp_path)

    return call


def output_of(command: list[str], folder: Path) -> str:
    # a path to the sources would come before what is installed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_medseg_segments_from_another_folder(
    python: Path, medseg: Callable[..., str], tiny_run, tmp_path: Path
) -> None:
    where = output_of([str(python), "-c", "import medseg; print(medseg.__file__)"], tmp_path)
    assert str(ROOT) not in where
    assert "medseg demo -o demo" in medseg("demo", "--help")
    assert "medseg-ablation" in output_of([str(python), "-m", "medseg_pipelines.ablation", "--help"], tmp_path)
    image = next((tiny_run.dataset / "images").iterdir())
    medseg("infer", str(image), "-m", str(tiny_run.folder), "-o", "masks", "--device", "cpu")
    assert (tmp_path / "masks" / image.name).is_file()


@pytest.mark.slow
def test_an_installed_medseg_finds_the_models_that_came_with_it(medseg: Callable[..., str], tmp_path: Path) -> None:
    listed = medseg("models")
    assert "hippocampus  Hippocampus in T1-weighted MR" in listed
    assert "nerve  Nerves and vessels in ultrasound" in listed
    image = sorted((ROOT / "medseg" / "sample" / "imagesTr").iterdir())[0]
    case = image.name.replace("_0000", "")
    medseg("infer", str(image), "-m", "hippocampus", "-o", "masks", "--device", "cpu")
    (mask,) = (tmp_path / "masks").glob("*.nii.gz")
    found, reference = (np.asarray(nib.load(p).dataobj) for p in (mask, ROOT / "medseg/sample/labelsTr" / case))
    # it has learnt this case; of a wrong mask, or one out of place, little would lie on the reference
    overlap = ((found > 0) & (reference > 0)).sum()
    assert 2 * overlap / ((found > 0).sum() + (reference > 0).sum()) > 0.8
