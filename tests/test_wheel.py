"""The wheel that `pip install` makes: complete, and at work far from the sources; what it does is tested elsewhere."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

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


@pytest.mark.slow
def test_an_installed_medseg_segments_from_another_folder(python: Path, tiny_run, tmp_path: Path) -> None:
    def medseg(*arguments: str) -> str:
        command = [str(python), "-m", "medseg", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [str(python), "-c", "import medseg; print(medseg.__file__)"]
    installed = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert str(ROOT) not in installed
    assert "medseg demo -o demo" in medseg("demo", "--help")
    pipeline = [str(python), "-m", "medseg_pipelines.ablation", "--help"]
    assert (
        "medseg-ablation" in subprocess.run(pipeline, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    )
    image = next((tiny_run.dataset / "images").iterdir())
    medseg("infer", str(image), "-m", str(tiny_run.folder), "-o", "masks", "--device", "cpu")
    assert (tmp_path / "masks" / image.name).is_file()
