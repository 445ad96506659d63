"""How well the expected Dice of a case without a reference agrees with its true Dice, also on bad images.

    python tests/benchmarks/quality.py DATASET RUN --foreign CT.nii.gz … -o tests/benchmarks/results/quality_NAME.json

The cases that RUN held back are split by patient: one half calibrates, as they are and degraded; the other half tests,
as it is and degraded in other ways. In the protocol `unseen_kinds` no kind of degradation of the test takes part in
the calibration; in `unseen_strengths` all kinds do, at other strengths, as in a calibration that ships. Blocks of the
foreign volumes, brought to the size of a training case, have no true Dice: every one must carry a warning.
Dice is that of the scores on the network's grid.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from machine import machine
from PIL import Image
from scipy import stats

import medseg
from medseg.cases import Case
from medseg.datasets import read_dataset
from medseg.preprocess import IGNORE_INDEX, Prepared, prepare
from medseg.quality import (
    DEGRADATIONS,
    LOW_DICE,
    Evidence,
    Profile,
    QualityModel,
    Sample,
    degrade,
    fit_quality,
    profile_of,
    samples_of,
)
from medseg.readers import read_image
from medseg.versions import versions

TEST_KINDS = ("noise", "blur", "spacing", "inversion")
# (kind, strength): the strengths of one set are not in the other
CALIBRATION = [("none", 0.0)] + [(kind, s) for kind in DEGRADATIONS for s in (0.2, 0.6, 1.0)]
TEST = [("none", 0.0)] + [(kind, s) for kind in TEST_KINDS for s in (0.1, 0.4, 0.9)]
FOREIGN = 24


@dataclass(frozen=True)
class Seen:
    """One version of one case after the network has seen it. `dice` is without labels that nobody has."""

    case: str
    kind: str
    strength: float
    prepared: Prepared
    evidence: Evidence
    dice: dict[str, float]


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--foreign", type=Path, nargs="*", default=[], help="volumes of another modality or body part")
    parser.add_argument("--cases", type=int, help="held-back cases that are used, all unless said")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    segmenter = medseg.load_model(arguments.run, options=medseg.InferOptions(device="cpu"))
    held_back = set(json.loads((arguments.run / "model.json").read_text())["training"]["validation_cases"])
    cases = read_dataset(arguments.dataset).labelled
    train = [c for c in cases if c.id not in held_back]
    first, second = halves([c for c in cases if c.id in held_back][: arguments.cases])
    config = segmenter.config
    if config.data.is_regions:
        parser.error("labels that overlap are not measured here")
    profile = profile_of((prepare(c, config.preprocess, config.data, with_label=True) for c in train), config.data)
    calibration = list(look(segmenter, first, CALIBRATION))
    test = list(look(segmenter, second, TEST))
    with tempfile.TemporaryDirectory() as folder:
        foreign_cases = foreign_blocks(arguments.foreign, Path(folder), test[0].prepared.source.shape)
        foreign = [segmented(segmenter, segmenter.prepare(c), c.id, "foreign", 0) for c in foreign_cases]
    protocols = {
        "unseen_kinds": [s for s in calibration if s.kind not in TEST_KINDS],
        "unseen_strengths": calibration,
    }
    result = {
        "data_set": arguments.dataset.name,
        "run": {k: v for k, v in segmenter.models[0].description["training"].items() if k != "validation_cases"},
        "network": config.network.name,
        "cases": {"profile": len(train), "calibration": len(first), "test": len(second), "foreign": len(foreign)},
        "calibrated_on": CALIBRATION,
        "tested_on": TEST,
        "protocols": {
            name: {
                members: protocol(seen, test, foreign, profile, with_members=members == "flips")
                for members in ("none", "flips")
            }
            for name, seen in protocols.items()
        },
        "seconds": round(time.perf_counter() - started),
        "machine": machine(),
        "versions": versions("medseg", "torch", "numpy", "scipy"),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def halves(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Two halves of about the same size; a patient is in one of them."""
    groups = sorted({c.group for c in cases}, key=lambda g: hashlib.sha256(f"quality:{g}".encode()).hexdigest())
    chosen = set(groups[::2])
    return [c for c in cases if c.group in chosen], [c for c in cases if c.group not in chosen]


def look(segmenter: medseg.Segmenter, cases: Sequence[Case], versions: Sequence[tuple[str, float]]) -> Iterator[Seen]:
    """Every version of every case, segmented."""
    config = segmenter.config
    for case in cases:
        prepared = prepare(case, config.preprocess, config.data, with_label=True)
        seed = int.from_bytes(hashlib.sha256(case.id.encode()).digest()[:4])
        for n, (kind, strength) in enumerate(versions):
            generator = np.random.default_rng([seed, n])
            worse = prepared if kind == "none" else degrade(prepared, kind, strength, generator)
            yield segmented(segmenter, worse, case.group, kind, strength, case.id)


def segmented(
    segmenter: medseg.Segmenter, prepared: Prepared, group: str, kind: str, strength: float, case: str = ""
) -> Seen:
    """A version after the network has seen it, as it is and mirrored along each axis that training mirrored."""
    data = segmenter.config.data
    members = [segmenter.scores(prepared.image)]
    for axis in segmenter.config.augment.flip_axes:
        members.append(segmenter.scores(prepared.image.flip(axis + 1)).flip(axis + 1))
    evidence = Evidence(data)
    evidence.add(members[0], (0,) * len(prepared.grid.shape), prepared.grid.shape, prepared.image)
    evidence.add_members([m[None] for m in members], torch.stack(members).mean(dim=0)[None])
    dice = {}
    if prepared.label is not None:
        judged = prepared.label != IGNORE_INDEX
        decided = members[0].argmax(dim=0)
        for channel, name in enumerate(data.foreground, start=1):
            ours, theirs = (decided == channel) & judged, prepared.label == channel
            if size := int(ours.sum() + theirs.sum()):
                dice[name] = 2 * int((ours & theirs).sum()) / size
    return Seen(group, kind, strength, prepared, evidence, dice)


def foreign_blocks(files: Sequence[Path], folder: Path, shape: Sequence[int]) -> list[Case]:
    """Blocks (planes for pictures) from all over the volumes, each as a file of `shape`."""
    cases = []
    generator = np.random.default_rng(0)
    for n in range(FOREIGN if files else 0):
        volume = read_image(files[n % len(files)]).array[0].astype(np.float32)
        if len(shape) == 2:
            plane = volume[:, :, int(generator.integers(volume.shape[2]))]
            low, high = np.percentile(plane, (0.5, 99.5))
            grey = (255 * np.clip((plane - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)
            path = folder / f"foreign_{n}.png"
            Image.fromarray(grey).resize((shape[1], shape[0])).save(path)
        else:
            size = [min(s, v) for s, v in zip(shape, volume.shape)]
            start = [int(generator.integers(v - s + 1)) for s, v in zip(size, volume.shape)]
            block = volume[tuple(slice(a, a + s) for a, s in zip(start, size))]
            path = folder / f"foreign_{n}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(block, np.eye(4)), path)
        cases.append(Case(path.name, (path,), None, path.name))
    return cases


def protocol(
    calibration: Sequence[Seen], test: Sequence[Seen], foreign: Sequence[Seen], profile: Profile, *, with_members: bool
) -> dict[str, Any]:
    """Fit on one list, measure on the others."""
    model = fit_quality([s for seen in calibration for s in samples(seen, profile)], profile)
    model = model if with_members else model.model_copy(update={"with_members": None})
    return {
        "weights": (model.with_members or model.plain).weights,
        "look_below": (model.with_members or model.plain).look_below,
        "all": measures(model, test),
        "clean": measures(model, [s for s in test if s.kind == "none"]),
        "degraded": measures(model, [s for s in test if s.kind != "none"]),
        "by_kind": {kind: measures(model, [s for s in test if s.kind == kind]) for kind in TEST_KINDS},
        "foreign": warned(model, foreign) if foreign else None,
    }


def warned(model: QualityModel, seen: Sequence[Seen]) -> dict[str, float]:
    """Shares of images without a true Dice that need a look, and that carry any warning."""
    found = [model.assess(s.prepared, s.evidence) for s in seen]
    return {
        "needs_a_look": rounded(np.mean([a.look for a in found])),
        "any_warning": rounded(np.mean([a.look or bool(a.warnings) for a in found])),
    }


def samples(seen: Seen, profile: Profile) -> list[Sample]:
    """What a version of a case teaches."""
    version = f"{seen.prepared.id} {seen.kind} {seen.strength}"
    return samples_of(profile, seen.prepared, seen.evidence, seen.dice, case=seen.case, version=version)


def measures(model: QualityModel, seen: Sequence[Seen]) -> dict[str, Any]:
    """Agreement of expected and true Dice, by label and for the mean of a case; and how often a warning is right."""
    judged = [(s, model.assess(s.prepared, s.evidence)) for s in seen if s.dice]
    result: dict[str, Any] = {"versions": len(judged)}
    names = seen[0].evidence.data.foreground
    for name in names:
        pairs = [(a.estimates[name], s.dice[name]) for s, a in judged if name in s.dice]
        pairs = [(e, d) for e, d in pairs if e.expected is not None]
        result[name] = agreement([e.expected for e, _ in pairs], [d for _, d in pairs]) | {
            "coverage": rounded(np.mean([e.low <= d <= e.high for e, d in pairs])),
            "interval_width": rounded(np.mean([e.high - e.low for e, _ in pairs])),
        }
    true = np.array([np.mean(list(s.dice.values())) for s, _ in judged])
    result["case_mean"] = agreement([a.expected or 0 for _, a in judged], true)
    looked = np.array([a.look for _, a in judged])
    any_warning = np.array([bool(a.warnings) for _, a in judged])
    bad = true < LOW_DICE
    result["dice_below_0.7"] = {
        "versions": int(bad.sum()),
        "needs_a_look": rounded(looked[bad].mean()) if bad.any() else None,
        "any_warning": rounded((looked | any_warning)[bad].mean()) if bad.any() else None,
    }
    result["dice_from_0.7"] = {
        "versions": int((~bad).sum()),
        "needs_a_look": rounded(looked[~bad].mean()) if (~bad).any() else None,
        "any_warning": rounded((looked | any_warning)[~bad].mean()) if (~bad).any() else None,
    }
    return result


def agreement(expected: Sequence[float], true: Sequence[float]) -> dict[str, float | None]:
    """Correlations and mean absolute error."""
    e, t = np.array(expected), np.array(true)
    varied = len(e) > 2 and e.std() > 0 and t.std() > 0
    return {
        "true_mean": rounded(t.mean()),
        "pearson": rounded(stats.pearsonr(e, t)[0]) if varied else None,
        "spearman": rounded(stats.spearmanr(e, t)[0]) if varied else None,
        "mean_absolute_error": rounded(np.abs(e - t).mean()),
    }


def rounded(value: float) -> float:
    """Four digits are more than the numbers of cases bear."""
    return round(float(value), 4)


if __name__ == "__main__":
    main()
