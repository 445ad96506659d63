"""The worst cases of an evaluation: each is read once, for its pictures and for the viewer; nothing is laid out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from medseg.errors import DataError
from medseg.evaluate import Evaluation
from medseg.progress import Progress, silent
from medseg.report.figures import Picture, contour_pictures
from medseg.report.layers import Layers, read_layers
from medseg.report.scene import MAX_BYTES, MAX_CASE_BYTES, MAX_CASES, Scene, make_scene

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorstCase:
    """A case as it is shown: mean Dice, pictures or the `reason` why there are none, and its scene in the viewer."""

    name: str
    dice: float
    pictures: Sequence[Picture]
    reason: str
    scene: Scene | None


def read_worst(
    evaluation: Evaluation,
    *,
    max_bytes: int = MAX_BYTES,
    max_case_bytes: int = MAX_CASE_BYTES,
    max_scenes: int = MAX_CASES,
    progress: Progress = silent,
) -> tuple[WorstCase, ...]:
    """The worst cases, the worst first. One that cannot be read any more has its reason, and is warned of.

    Of scenes with more than `max_bytes` (base64) together the least bad ones are left out; 2D cases have none.
    """
    found: list[WorstCase] = []
    n_scenes, left = 0, max_bytes
    entries = evaluation.summary["worst_cases"]
    for number, entry in enumerate(entries):
        progress("draw", number, len(entries))
        name, dice = entry["case"], entry["dice"]
        pair = evaluation.pairs[name]
        try:
            layers = read_layers(pair, evaluation)
        except DataError as error:
            logger.warning("%s is not pictured: %s", name, error)
            found.append(WorstCase(name, dice, (), str(error), None))
            continue
        scene = None
        if n_scenes < max_scenes and left > 0 and _is_volume(layers):
            most = min(max_case_bytes, max_bytes)
            scene = make_scene(layers, evaluation.labels, evaluation.colours, case=name, dice=dice, max_bytes=most)
            left -= scene.size
            scene, n_scenes = (scene, n_scenes + 1) if left >= 0 else (None, n_scenes)
        found.append(WorstCase(name, dice, contour_pictures(layers, pair, evaluation), "", scene))
    progress("draw", len(entries), len(entries))
    return tuple(found)


def _is_volume(layers: Layers) -> bool:
    return layers.grid.spatial_dims == 3 and min(layers.grid.shape) >= 2
