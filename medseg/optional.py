"""The one door for packages that medseg works without: found, or named with the extra that brings them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from medseg.errors import ConfigError


def require(module: str, extra: str) -> ModuleType:
    """The optional `module`. Raises `ConfigError` naming the `extra` of medseg that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{module} cannot be used ({error}); run `pip install '.[{extra}]'` in the folder of the repository"
        ) from error
