"""Which model a folder holds, by the digests of its files; the models themselves are the library's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import medseg
from medseg_pipelines.hospital.settings import RuleSettings
from medseg_pipelines.hospital.store import sha256_of


@dataclass(frozen=True)
class ModelFiles:
    """SHA-256 of the weights of a model, and of what describes it."""

    weights_sha256: str
    description_sha256: str


class Models:
    """The digests of models, computed once for each state of their files."""

    def __init__(self) -> None:
        self._digests: dict[tuple[Path, int, int], str] = {}

    def of(self, model: str) -> ModelFiles:
        """Of a run folder, or of a name of `medseg models`. Raises `OSError` where its files cannot be read."""
        weights = medseg.weights_file(Path(model))
        return ModelFiles(self._digest(weights), self._digest(weights.with_suffix(".json")))

    def _digest(self, path: Path) -> str:
        state = path.stat()
        key = (path, state.st_mtime_ns, state.st_size)
        if key not in self._digests:
            self._digests[key] = sha256_of(path)
        return self._digests[key]


def model_of(models: Models, rule: RuleSettings) -> ModelFiles:
    """Of the model that a rule names. Raises `ConfigError` where it is not there."""
    try:
        return models.of(rule.model)
    except OSError as error:
        raise medseg.ConfigError(
            f"rule {rule.name}: model {rule.model}: {error.filename} cannot be read ({error.strerror}), expected a run "
            "folder or a name of `medseg models`; change `model`"
        ) from error
