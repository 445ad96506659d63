"""Every file keeps the laws of the house, and every law can be broken: each is shown to find a breach."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import house
import pytest

import medseg

ROOT = Path(__file__).parents[1]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "pipelines":
        parts[0] = "medseg_pipelines"
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(p for folder in ("medseg", "pipelines") for p in (ROOT / folder).rglob("*.py"))
SOURCES = {module_name(path): path.read_text(encoding="utf-8") for path in FILES}
TREES = {module: ast.parse(source) for module, source in SOURCES.items()}
KNOWN = frozenset(SOURCES)


def breaches(law: Callable[[str, ast.Module], list[str]], module: str, source: str) -> list[str]:
    return law(module, ast.parse(source))


def upward(module: str, tree: ast.AST) -> list[str]:
    return house.upward(module, tree, KNOWN)


LAWS: list[Callable[[str, ast.Module], list[str]]] = [
    upward,
    house.beside_the_face,
    house.file_libraries,
    house.prints_or_environment,
    house.foreign_code,
    house.swallowed,
    house.asserts,
    house.undocumented,
]


def test_there_are_files_to_judge() -> None:
    assert {"medseg", "medseg.cli", "medseg.grid", "medseg.readers.nifti", "medseg.networks.resnet"} <= KNOWN


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_every_file_keeps_the_law(law: Callable[[str, ast.Module], list[str]]) -> None:
    assert [found for module, tree in TREES.items() for found in law(module, tree)] == []


def test_no_file_is_too_long() -> None:
    assert [found for module, source in SOURCES.items() for found in house.too_long(module, source)] == []


def test_imports_run_in_no_circle() -> None:
    graph = {
        module: {name for _, name in house.imports(tree, KNOWN, typing=False) if name in KNOWN and name != module}
        for module, tree in TREES.items()
    }
    assert house.circles(graph) == []


# ---- each law finds its breach, and lets what is right pass


@pytest.mark.parametrize(
    ("law", "module", "source"),
    [
        (upward, "medseg.grid", "from medseg.readers import read_image"),
        (upward, "medseg.grid", "import medseg"),
        (upward, "medseg.preprocess", "def f():\n    from medseg.patches import cut"),
        (upward, "medseg.model", "if TYPE_CHECKING:\n    from medseg.train import Run"),
        (upward, "medseg.infer", "import medseg.train"),
        (upward, "medseg.train", "from medseg import demo"),
        (upward, "medseg.train", "from .infer import load_model"),
        (upward, "medseg.readers.nifti", "from medseg.preprocess import prepare"),
        (house.beside_the_face, "medseg.cli", "from medseg.infer import load_model"),
        (house.beside_the_face, "medseg_pipelines.hospital.worker", "def f():\n    import medseg.infer"),
        (house.file_libraries, "medseg.preprocess", "import nibabel as nib"),
        (house.file_libraries, "medseg.evaluate", "def f():\n    from PIL.Image import open"),
        (house.file_libraries, "medseg_pipelines.crossval", "from pydicom import dcmread"),
        (house.file_libraries, "medseg.check", "import SimpleITK"),
        (house.prints_or_environment, "medseg.train", "print('hello')"),
        (house.prints_or_environment, "medseg.train", "import os\nx = os.environ['A']"),
        (house.prints_or_environment, "medseg.train", "import os\nx = os.getenv('A')"),
        (house.prints_or_environment, "medseg.train", "from os import environ\nx = environ['A']"),
        (house.foreign_code, "medseg.cli", "eval('1')"),
        (house.foreign_code, "medseg.cli", "exec('1')"),
        (house.foreign_code, "medseg.model", "import pickle"),
        (house.foreign_code, "medseg.model", "from pickle import loads"),
        (house.foreign_code, "medseg.config", "yaml.load(text)"),
        (house.foreign_code, "medseg.config", "yaml.unsafe_load(text)"),
        (house.foreign_code, "medseg.train", "torch.load(path)"),
        (house.foreign_code, "medseg.train", "torch.load(path, weights_only=False)"),
        (house.foreign_code, "medseg.readers", "np.load(path, allow_pickle=True)"),
        (house.swallowed, "medseg.train", "try:\n    f()\nexcept ValueError:\n    pass"),
        (house.swallowed, "medseg.train", "try:\n    f()\nexcept:\n    log()"),
        (house.swallowed, "medseg.train", "try:\n    f()\nexcept Exception:\n    ..."),
        (house.asserts, "medseg.train", "assert x > 0"),
        (house.undocumented, "medseg.train", "x = 1"),
        (house.undocumented, "medseg.train", '"""Module."""\ndef train(): ...'),
        (house.undocumented, "medseg.train", '"""Module."""\nclass Run: ...'),
        (house.undocumented, "medseg.train", '"""M."""\nclass Run:\n    """R."""\n    def save(self): ...'),
    ],
)
def test_a_breach_is_found(law: Callable[[str, ast.Module], list[str]], module: str, source: str) -> None:
    assert len(breaches(law, module, source)) == 1


@pytest.mark.parametrize(
    ("law", "module", "source"),
    [
        (upward, "medseg.patches", "from medseg.preprocess import Prepared"),
        (upward, "medseg.demo", "from medseg.train import train"),
        (upward, "medseg.cli", "import medseg"),
        (upward, "medseg", "if TYPE_CHECKING:\n    from medseg.cli import main"),
        (house.beside_the_face, "medseg.cli", "import medseg"),
        (house.beside_the_face, "medseg_pipelines.crossval", "from medseg import train"),
        (house.beside_the_face, "medseg_pipelines.crossval", "from medseg_pipelines.hospital import jobs"),
        (house.file_libraries, "medseg.writers.nifti", "import nibabel"),
        (house.prints_or_environment, "medseg.cli", "print(os.environ)"),
        (house.foreign_code, "medseg.train", "network.eval()\ntorch.load(p, weights_only=True)\nyaml.safe_load(t)"),
        (house.swallowed, "medseg.infer", "try:\n    f()\nexcept ValueError as e:\n    log.warning(e)"),
        (house.undocumented, "medseg.train", '"""M."""\ndef f():\n    """F."""\ndef _g(): ...'),
    ],
)
def test_what_is_right_passes(law: Callable[[str, ast.Module], list[str]], module: str, source: str) -> None:
    assert breaches(law, module, source) == []


def test_a_room_without_a_floor_is_named() -> None:
    with pytest.raises(LookupError, match="cellar"):
        house.floor("medseg.cellar")


def test_no_room_is_on_two_floors() -> None:
    rooms = [name for floor in house.FLOORS for name in floor]
    assert len(rooms) == len(set(rooms))
    assert "__init__" in house.FLOORS[house.FACE]
    assert "cli" in house.FLOORS[house.TOP]


def test_a_circle_is_found() -> None:
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
    assert house.circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_a_long_file_is_found() -> None:
    assert house.too_long("m", "x = 1\n" * house.MAX_LINES)
    assert not house.too_long("m", "x = 1\n" * (house.MAX_LINES - 1))


# ---- the face


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def test_everything_that_is_promised_can_be_imported() -> None:
    assert medseg.__all__ == sorted(medseg.__all__)
    assert len(set(medseg.__all__)) == len(medseg.__all__)
    for name in medseg.__all__:
        assert getattr(medseg, name) is not None, name


def test_nothing_is_on_the_face_that_is_not_promised() -> None:
    assert set(medseg._HOME) | {"__version__"} == set(medseg.__all__)
    listed = {name for name in python("import medseg; print(*dir(medseg))").split() if not name.startswith("_")}
    assert set(medseg._HOME) <= listed


def test_type_checkers_see_what_python_sees() -> None:
    typed = {
        alias.name
        for node in ast.walk(TREES["medseg"])
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("medseg")
        for alias in node.names
    }
    assert typed == set(medseg._HOME)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = medseg.trian  # type: ignore[attr-defined]


def test_the_face_is_quick_and_does_not_wake_torch() -> None:
    code = (
        "import sys, time; start = time.process_time(); import medseg; print(time.process_time() - start); "
        "print(*(name in sys.modules for name in ('torch', 'monai', 'pandas', 'pydicom', 'highdicom', 'SimpleITK')))"
    )
    seconds, woken = python(code).splitlines()
    assert float(seconds) < 0.5
    assert set(woken.split()) == {"False"}


def test_functions_are_not_hidden_by_modules_of_their_names() -> None:
    names = sorted(n for n in medseg._HOME if (ROOT / "medseg" / f"{n}.py").is_file())
    assert {"train", "infer", "plan", "demo"} <= set(names)
    modules = ", ".join(f"medseg.{n}" for n in names)
    code = (
        f"import sys, medseg, {modules}\n"
        f"from medseg import {', '.join(names)}\n"
        f"print(all(callable(f) and callable(getattr(medseg, f.__name__)) for f in ({', '.join(names)},)))\n"
        f"print(*(sys.modules['medseg.' + n].__name__ for n in {names}))"
    )
    assert python(code).splitlines() == ["True", " ".join(f"medseg.{n}" for n in names)]
