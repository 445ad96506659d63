"""With torchvision's weights medseg's networks give torchvision's answers; skipped where it is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from benchmarks import torchvision_parity as parity

if find_spec("torchvision") is None:
    pytest.skip(
        "torchvision is not installed; tests/benchmarks/results/torchvision_parity.json tells of a run beside it",
        allow_module_level=True,
    )

# float32 has 24 bits, 6e-8 of a value; sums of up to 18,432 products in another order lose a few of them
ROUNDING = 2e-6


def test_deeplabv3_gives_the_same_logits() -> None:
    for comparison in parity.deeplabv3():
        assert comparison.difference < 1e-4, comparison
        assert comparison.difference < ROUNDING * comparison.largest, comparison


@pytest.mark.slow
def test_encoders_give_the_same_maps_at_every_output_stride() -> None:
    for comparison in (*parity.resnets(), *parity.vgg16()):
        assert comparison.largest > 0
        assert comparison.difference < ROUNDING * comparison.largest, comparison
