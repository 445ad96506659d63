"""Where an export may be written: endings, and what may be replaced; nothing is written here."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from medseg.errors import ConfigError

ONNX, ZIP = ".onnx", ".zip"
METADATA = "configs/metadata.json"
"""The file that makes a folder a bundle; that of ours has the key `medseg`."""


def check_output(output: Path, *, to: str, overwrite: bool) -> None:
    """Raises `ConfigError` where no export can become `output`, or something is there that may not be replaced."""
    try:
        # what is new, or below a file, is judged by the folders above
        with suppress(FileNotFoundError, NotADirectoryError):
            output.stat()
        _check_place(output, to=to, overwrite=overwrite)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be looked at ({error.strerror}); change -o") from error


def _check_place(output: Path, *, to: str, overwrite: bool) -> None:
    ending = output.suffix.lower()
    if to == "onnx":
        _check_file(output, f"a file that ends in {ONNX}", fits=ending == ONNX, overwrite=overwrite)
    elif ending == ZIP:
        # what a link leads to is what is replaced
        fits = output.resolve().suffix.lower() == ZIP
        _check_file(output, f"a file that ends in {ZIP}", fits=fits, overwrite=overwrite)
    else:
        _check_folder(output, overwrite=overwrite)
    if to == "bundle" and not _is_text(output.resolve().name):
        raise ConfigError(f"{output}: a name that is not UTF-8 found, which the bundle could not tell; change -o")
    there = next(parent for parent in output.absolute().parents if parent.exists())
    if not there.is_dir():
        raise ConfigError(f"{output}: {there} is a file, expected a folder; change -o")


def _check_file(output: Path, expected: str, *, fits: bool, overwrite: bool) -> None:
    if output.is_dir() or not fits:
        found = "a folder" if output.is_dir() else f"ending {output.suffix or 'missing'}"
        raise ConfigError(f"{output}: {found} found, expected {expected}; change -o")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: a file found, expected none yet; change -o, or replace it with --overwrite")


def _check_folder(output: Path, *, overwrite: bool) -> None:
    expected = f"expected a new folder, or a file that ends in {ZIP}"
    if output.suffix.lower() == ONNX:
        raise ConfigError(f"{output}: ending {output.suffix} found, {expected}; change -o, or use --to onnx")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: a file found, {expected}; change -o")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not _is_ours(output / METADATA):
        raise ConfigError(f"{output}: a folder with something in it found, {expected}; change -o")
    if not overwrite:
        raise ConfigError(f"{output}: a bundle of ours found, {expected}; change -o, or replace it with --overwrite")


def _is_ours(metadata: Path) -> bool:
    try:
        told = json.loads(metadata.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return False
    return isinstance(told, dict) and "medseg" in told


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
