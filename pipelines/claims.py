"""The founding claims as data: a question, the variants that answer it, what is compared, and the verdict in words."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import medseg
from medseg_pipelines.compare import Difference, Outcome, difference

Word = Literal["holds", "does not hold", "not decided", "not measured"]
DEEPEST = 32
SMALL_PX = 16


@dataclass(frozen=True)
class Variant:
    """A network with settings. `network` is laid over the plan before the width is fitted, the rest after it.

    So variants that differ in the rest alone have the same width. `match`: another variant whose number of parameters
    this one is brought to; None: the common measure. `data`: the given data set, or the synthetic discs.
    """

    name: str
    network: Mapping[str, Any]
    deep: bool = False
    """Give the `light` encoder as many stages as the deepest output stride needs."""
    change: Mapping[str, Any] = field(default_factory=dict)
    output_stride: int | None = None
    """With ASPP rates that see as far as those of the plan."""
    rates_beyond_map: bool = False
    """Let every ASPP rate be as large as the feature map of a patch, or larger."""
    match: Variant | None = None
    data: Literal["given", "discs"] = "given"

    def settings(self, config: medseg.Config) -> dict[str, Any]:
        """What is laid over the network section of the fitted `config`."""
        if not self.rates_beyond_map:
            return dict(self.change)
        side = max(-(-n // config.network.output_stride) for n in config.windows.patch_size)
        return {**self.change, "aspp_rates": [side * n for n in range(1, len(config.network.aspp_rates) + 1)]}


@dataclass(frozen=True)
class Contrast:
    """`better` is claimed to score higher than `worse` by `measure`: dice, or one of the discs' measures."""

    better: str
    worse: str
    measure: str = "dice"


@dataclass(frozen=True)
class Claim:
    """A question with a name, in words; the claim holds where every contrast does."""

    name: str
    question: str
    expectation: str
    variants: tuple[Variant, ...]
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class Verdict:
    """A claim judged: a word, a sentence with numbers, and the differences behind it."""

    claim: Claim
    word: Word
    sentence: str
    differences: tuple[tuple[Contrast, Difference | None], ...]


LIGHT = {"name": "deeplabv3", "encoder": "light"}
DEEPLAB = Variant("deeplabv3-light", LIGHT, deep=True)
OUTPUT_STRIDES = tuple(
    Variant(f"deeplabv3-stride-{stride}", LIGHT, deep=True, output_stride=stride) for stride in (4, 8, 16, 32)
)
RESIDUAL_UNET = Variant("residual_unet-equal-parameters", {"name": "residual_unet"}, match=DEEPLAB)
POOLING = tuple(
    Variant(f"deeplabv3-image-pooling-{word}", LIGHT, change={"image_pooling": word == "on"}) for word in ("on", "off")
)
# the last stage of the light encoder has two blocks, which cannot tell 1 2 1 from 1 2 4: here it has three
MULTI_GRID = tuple(
    Variant(
        f"deeplabv3-multi-grid-{'-'.join(map(str, grid))}",
        {"name": "deeplabv3", "encoder": "resnet34"},
        change={"multi_grid": grid},
    )
    for grid in ([1], [1, 2, 1], [1, 2, 4])
)
# in an encoder the dense layers before the dilated ones fill the holes; a stack without them shows the grid itself
STACK = {"name": "dilated_stack", "dilations": [1, 2, 5, 1, 2, 5]}
GRIDDING = (
    Variant("hdc-dilations-1-2-5", {"name": "hdc"}, change={"dilations": [1, 2, 5]}),
    Variant("hdc-dilations-2-2-2", {"name": "hdc"}, change={"dilations": [2, 2, 2]}),
    Variant("dilated_stack-dilations-1-2-5", STACK),
    Variant("dilated_stack-dilations-2-2-2", STACK, change={"dilations": [2] * 6}),
)
RATES = (
    Variant("deeplabv3-rates-that-fit", LIGHT),
    Variant("deeplabv3-rates-beyond-the-map", LIGHT, rates_beyond_map=True),
)
# published with 4096 channels of 7-wide kernels, beside which the light encoder would shrink to nothing
FCN = {"encoder": "light", "hidden_channels": 256}
DISCS = (
    Variant("discs-deeplabv3-stride-4", LIGHT, deep=True, output_stride=4, data="discs"),
    Variant("discs-deeplabv3-stride-16", LIGHT, deep=True, output_stride=16, data="discs"),
    Variant("discs-fcn32s-stride-16", {"name": "fcn32s", "output_stride": 16, **FCN}, deep=True, data="discs"),
    Variant("discs-fcn16s-stride-16", {"name": "fcn16s", "output_stride": 16, **FCN}, deep=True, data="discs"),
    Variant("discs-fcn32s-stride-32", {"name": "fcn32s", "output_stride": 32, **FCN}, deep=True, data="discs"),
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "dilation",
        "Is dilation better than pooling and upsampling at equal parameters?",
        "A dilated network that keeps a stride of 8 beats a residual U-Net of as many parameters, and itself at 32.",
        (*OUTPUT_STRIDES, RESIDUAL_UNET),
        (
            Contrast("deeplabv3-stride-8", RESIDUAL_UNET.name),
            Contrast("deeplabv3-stride-8", "deeplabv3-stride-32"),
        ),
    ),
    Claim(
        "small-structures",
        "Does a four-times-pooled network lose what is under 16 pixels?",
        "It finds fewer of the discs under 16 pixels than a dilated one at stride 4, and loses less of the larger.",
        DISCS,
        tuple(
            Contrast(DISCS[0].name, other.name, measure)
            for other in DISCS[1:4]
            for measure in ("small", "small_beyond_large")
        ),
    ),
    Claim(
        "gridding",
        "Do dilations without a common factor (1, 2, 5) beat equal ones (2, 2, 2)?",
        "Dilations 2, 2, 2 leave a grid of voxels that never reach the output; 1, 2, 5 see all of them.",
        GRIDDING,
        (
            Contrast(GRIDDING[0].name, GRIDDING[1].name),
            Contrast(GRIDDING[2].name, GRIDDING[3].name),
        ),
    ),
    Claim(
        "rates",
        "Do ASPP rates that fit the feature map beat rates larger than it?",
        "A 3-wide kernel whose taps all lie in the padding is a 1-wide one: context is lost.",
        RATES,
        (Contrast(RATES[0].name, RATES[1].name),),
    ),
    Claim(
        "image-pooling",
        "Does the image-level branch of ASPP help?",
        "The mean over the map brings the context that no rate reaches.",
        POOLING,
        (Contrast(POOLING[0].name, POOLING[1].name),),
    ),
    Claim(
        "multi-grid",
        "Do different dilations within the last stage (1, 2, 4) beat equal ones?",
        "Multi-grid 1, 2, 4 is better than 1, 2, 1, and that better than none.",
        MULTI_GRID,
        (
            Contrast(MULTI_GRID[2].name, MULTI_GRID[0].name),
            Contrast(MULTI_GRID[1].name, MULTI_GRID[0].name),
            Contrast(MULTI_GRID[2].name, MULTI_GRID[1].name),
        ),
    ),
    Claim(
        "output-stride",
        "Is a smaller output stride better, with the same weights and the same minutes?",
        "4 beats 8, 8 beats 16, 16 beats 32: finer maps keep what coarse ones blur.",
        OUTPUT_STRIDES,
        tuple(Contrast(a.name, b.name) for a, b in itertools.pairwise(OUTPUT_STRIDES)),
    ),
)


def choose_claims(text: str) -> tuple[Claim, ...]:
    """The claims of `all`, `none` or names with commas. Raises `ConfigError` naming those that exist."""
    known = {claim.name: claim for claim in CLAIMS}
    if text in ("all", "none"):
        return CLAIMS if text == "all" else ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise medseg.ConfigError(
            f"--claims {text}: there is no `{', '.join(wrong)}`; choose all, none, or from {', '.join(known)}"
        )
    return tuple(known[name] for name in names)


def judge(claim: Claim, outcomes: Mapping[str, Outcome], *, groups: Mapping[str, str] | None = None) -> Verdict:
    """What the results say of a claim, by paired differences over cases and their 95 % intervals."""
    differences = tuple(
        (c, difference(outcomes.get(c.better), outcomes.get(c.worse), c.measure, groups=groups))
        for c in claim.contrasts
    )
    word = _word([d for _, d in differences])
    parts = [_part(contrast, found, outcomes) for contrast, found in differences]
    said = {
        "holds": "Holds",
        "does not hold": "Does not hold",
        "not decided": "Not decided within the interval",
        "not measured": "Not measured",
    }[word]
    return Verdict(claim, word, f"{said}: {'; '.join(parts)}.", differences)


def _word(found: Sequence[Difference | None]) -> Word:
    measured = [d for d in found if d is not None]
    if any(d.ci95 is not None and d.ci95[1] < 0 for d in measured):
        return "does not hold"
    if len(measured) < len(found):
        return "not measured" if not measured else "not decided"
    if all(d.ci95 is not None and d.ci95[0] > 0 for d in measured):
        return "holds"
    return "not decided"


def _part(contrast: Contrast, found: Difference | None, outcomes: Mapping[str, Outcome]) -> str:
    names = f"{contrast.better} against {contrast.worse}"
    if found is None:
        missing = [n for n in (contrast.better, contrast.worse) if n not in outcomes]
        return f"{names} is missing ({', '.join(missing) or 'no case in common'} has no result)"
    interval = "no interval" if found.ci95 is None else f"95 % {found.ci95[0]:+.3f} to {found.ci95[1]:+.3f}"
    what = MEASURES[contrast.measure]
    means = "" if contrast.measure == "small_beyond_large" else f" ({found.first:.3f} and {found.second:.3f})"
    return f"{names}, {what} {found.mean:+.3f} ({interval}; {found.n} cases){means}"


MEASURES = {
    "dice": "Dice",
    "small": f"share found of discs under {SMALL_PX} px",
    "large": f"share found of discs of {SMALL_PX} px and more",
    "small_beyond_large": "and by how much more under than from 16 px on:",
}
