"""What a case that is held back must not be: learnt under another name, or by the weights that training begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from medseg.cases import Case
from medseg.errors import ConfigError
from medseg.findings import CaseFacts
from medseg.fingerprint import image_digests, voxel_digests
from medseg.pretrained import learnt_images
from medseg.readers import file_sha256


def refuse_leaks(
    training: Sequence[Case],
    held_back: Sequence[Case],
    *,
    weights: Path | None = None,
    file_digest: Callable[[Path], str] = file_sha256,
    facts: Sequence[CaseFacts] = (),
) -> None:
    """Raises `ConfigError` where an image of `held_back` is learnt: its Dice would say nothing about new cases.

    Either under another name in `training`, or by the run that `weights` belong to; of weights from elsewhere nobody
    knows what they have learnt. `facts`: what a look at all files found; with them the same voxels in other bytes are
    known too, but not those that a run of an earlier version has learnt.
    """
    learnt, kept = (image_digests(cases, file_digest=file_digest) for cases in (training, held_back))
    files = {case.id: case.images[0] for case in (*training, *held_back)}
    _refuse_twins(learnt, kept, files)
    learnt_voxels, kept_voxels = (voxel_digests(cases, facts) for cases in (training, held_back))
    _refuse_twins(learnt_voxels, kept_voxels, files)
    if weights is not None:
        _refuse_learnt(weights, {"images_sha256": kept, "images_voxels": kept_voxels})


def _refuse_twins(learnt: Mapping[str, str], held_back: Mapping[str, str], files: Mapping[str, Path]) -> None:
    names = {digest: case for case, digest in learnt.items()}
    twins = [(case, names[digest]) for case, digest in held_back.items() if digest in names]
    if twins:
        case, twin = twins[0]
        raise ConfigError(
            f"{files[case]}: {len(twins)} of the {len(held_back)} cases held back are trained on under another name, "
            f"first {case} as {twin} ({files[twin]}): their Dice would flatter. Delete one of each, or give both the "
            "same group or fold"
        )


def _refuse_learnt(weights: Path, held_back: Mapping[str, Mapping[str, str]]) -> None:
    """`held_back`: by the key of `learnt_images`, the digest of each case; every case has one of its files."""
    learnt, cases = learnt_images(weights), held_back["images_sha256"]
    known = [c for c in cases if any(of.get(c) in learnt[key] for key, of in held_back.items())]
    if known:
        raise ConfigError(
            f"{weights}: has learnt {len(known)} of the {len(cases)} cases held back, first {known[0]}: their "
            "Dice would say nothing about new cases; begin with other weights or with none, or hold back cases that "
            "they do not know"
        )
