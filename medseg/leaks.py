"""What a case that is held back must not be: learnt under another name, or by the weights that training begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from medseg.cases import Case
from medseg.errors import ConfigError
from medseg.findings import CaseFacts
from medseg.fingerprint import image_digests, stored_voxel_digests, voxel_digests
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
    knows what they have learnt. Of what weights have learnt one channel of several is enough, if no other patient has
    it. `facts`: what a look at all files found; with them the same voxels in other bytes are known too.
    """
    cases = (*training, *held_back)
    files = {case.id: case.images[0] for case in cases}
    whole = (
        image_digests(cases, file_digest=file_digest, by_channel=False),
        voxel_digests(cases, facts, by_channel=False),
    )
    for digests in whole:
        learnt, kept = (_of(part, digests) for part in (training, held_back))
        _refuse_twins(learnt, kept, files)
    if weights is not None:
        images, voxels = image_digests(cases, file_digest=file_digest), voxel_digests(cases, facts)
        before = stored_voxel_digests(facts)
        either = {case: found | {before.get(case, "")} for case, found in voxels.items()}
        _refuse_learnt(weights, held_back, {"images_sha256": images, "images_voxels": either})


def _of(cases: Sequence[Case], digests: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    return {case.id: digests[case.id] for case in cases if case.id in digests}


def _refuse_twins(
    learnt: Mapping[str, frozenset[str]], held_back: Mapping[str, frozenset[str]], files: Mapping[str, Path]
) -> None:
    names = {digest: case for case, found in learnt.items() for digest in found}
    twins = {case: names[min(same)] for case, found in held_back.items() if (same := found & names.keys())}
    if twins:
        case, twin = next(iter(twins.items()))
        raise ConfigError(
            f"{files[case]}: {len(twins)} of the {len(held_back)} cases held back are trained on under another name, "
            f"first {case} as {twin} ({files[twin]}): their Dice would flatter. Delete one of each, or give both "
            "the same group or fold"
        )


def _refuse_learnt(
    weights: Path, held_back: Sequence[Case], digests: Mapping[str, Mapping[str, frozenset[str]]]
) -> None:
    """`digests`: by the key of `learnt_images`, those of each case."""
    learnt, cases = learnt_images(weights), [case.id for case in held_back]
    known = [c for c in cases if any(of.get(c, frozenset()) & learnt[key] for key, of in digests.items())]
    if known:
        raise ConfigError(
            f"{weights}: has learnt {len(known)} of the {len(cases)} cases held back, first {known[0]}: their "
            "Dice would say nothing about new cases; begin with other weights or with none, or hold back cases that "
            "they do not know"
        )
