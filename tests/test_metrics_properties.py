"""What must hold for every pair: symmetries, agreement with a naive implementation, and one result however computed."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from medseg.metrics import boundary, boundary_iou, measure, surfaces

SURFACES = ("surfel", "voxel")
SYMMETRIC = ("dice", "iou", "hd_mm", "hd95_mm", "assd_mm", "masd_mm", "nsd", "boundary_iou")
SPACINGS = ((1.0, 1.0, 1.0), (0.8, 1.5, 3.0), (0.1, 0.1, 0.7))
quick = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def pairs(draw, dims=(2, 3), side=5):
    """Prediction, reference (either may be empty), spacing and kind of surface."""
    n = draw(st.sampled_from(dims))
    shape = draw(array_shapes(min_dims=n, max_dims=n, min_side=1, max_side=side))
    spacing = draw(st.sampled_from(SPACINGS))[:n]
    maps = [draw(arrays(np.uint8, shape, elements=st.integers(0, 1))) for _ in range(2)]
    return *maps, spacing, draw(st.sampled_from(SURFACES))


def row(prediction, reference, spacing, surface, value=1, tolerance=1.0):
    return measure(
        prediction, reference, [value], spacing_mm=spacing, surface=surface, nsd_tolerance_mm=tolerance,
        extra=["boundary_iou"],
    )[value]  # fmt: skip


def same(one, other, names):
    return [getattr(one, n) for n in names] == pytest.approx([getattr(other, n) for n in names], abs=1e-9, nan_ok=True)


EVERY = (*SYMMETRIC, "precision", "recall", "specificity", "relative_volume_difference")


@quick
@given(pairs())
def test_swapping_both_maps_swaps_precision_and_recall_and_nothing_else(pair):
    prediction, reference, *how = pair
    one, other = row(prediction, reference, *how), row(reference, prediction, *how)
    assert same(one, other, SYMMETRIC)
    assert (one.precision, one.recall) == pytest.approx((other.recall, other.precision), nan_ok=True)


@quick
@given(pairs(), st.data())
def test_mirror_images_have_one_result(pair, data):
    prediction, reference, *how = pair
    axes = data.draw(st.sets(st.sampled_from(range(prediction.ndim))))
    mirrored = row(np.flip(prediction, tuple(axes)), np.flip(reference, tuple(axes)), *how)
    assert same(row(prediction, reference, *how), mirrored, EVERY)


@quick
@given(pairs(), st.data())
def test_the_order_of_axes_does_not_matter(pair, data):
    prediction, reference, spacing, surface = pair
    axes = data.draw(st.permutations(range(prediction.ndim)))
    turned = [np.ascontiguousarray(m.transpose(axes)) for m in (prediction, reference)]
    other = row(*turned, [spacing[a] for a in axes], surface)
    assert same(row(prediction, reference, spacing, surface), other, EVERY)


@quick
@given(pairs(), st.integers(1, 3))
def test_background_around_changes_specificity_only(pair, margin):
    prediction, reference, *how = pair
    padded = row(np.pad(prediction, margin), np.pad(reference, margin), *how)
    assert same(row(prediction, reference, *how), padded, [n for n in EVERY if n != "specificity"])


@quick
@given(pairs(), st.integers(2, 100_000))
def test_the_value_of_a_label_does_not_matter(pair, value):
    prediction, reference, *how = pair
    other = row(prediction.astype(np.int32) * value, reference.astype(np.int32) * value, *how, value=value)
    assert same(row(prediction, reference, *how), other, EVERY)


@quick
@given(pairs())
def test_other_labels_do_not_matter(pair):
    prediction, reference, *how = pair
    among = [np.where(m == 0, 3, m).astype(np.uint8) for m in (prediction, reference)]
    found = measure(*among, [1, 3], spacing_mm=how[0], surface=how[1], extra=["boundary_iou"])[1]
    assert same(row(prediction, reference, *how), found, EVERY)


@quick
@given(pairs())
def test_measures_keep_their_order(pair):
    found = row(*pair)
    if found.status == "ok":
        assert found.hd_mm >= found.hd95_mm >= 0
        assert found.hd_mm >= max(found.assd_mm, found.masd_mm)
        assert found.dice >= found.iou
        assert 0 <= found.nsd <= 1


@quick
@given(pairs(), st.floats(0, 5), st.floats(0, 5))
def test_nsd_grows_with_the_tolerance(pair, one, other):
    less, more = (row(*pair, tolerance=t).nsd for t in sorted((one, other)))
    assert math.isnan(less) or less <= more


# ---- a naive implementation: loops over cells and all pairs of elements


CORNERS = tuple(itertools.product((0, 1), repeat=3))


@lru_cache(maxsize=4096)
def naive_area(inside, spacing):
    """Area of the surface around the set of corners `inside` of one cell: blobs joined by edges, the rarer side.

    Each blob's polygon joins the middles of the cut edges, in turn around the blob; its fan of triangles is the one of
    the largest area in a cube.
    """
    if len(inside) > 4:
        inside = frozenset(CORNERS) - inside
    total, left = 0.0, set(inside)
    while left:
        blob, new = set(), {left.pop()}
        while new:
            blob |= new
            new = {c for c in left if any(np.abs(np.subtract(c, b)).sum() == 1 for b in blob)}
            left -= new
        total += blob_area(blob, spacing)
    return total


def blob_area(blob, spacing):
    cut = [
        (np.array(b), np.array(c)) for b in blob for c in CORNERS
        if c not in blob and np.abs(np.subtract(b, c)).sum() == 1
    ]  # fmt: skip
    if not cut:
        return 0.0
    points = np.array([(b + c) / 2 for b, c in cut])
    outwards = sum(c - b for b, c in cut)
    if not outwards.any():
        return 0.0
    # around the axis along which the blob lies outside, by angle
    axis = outwards / np.linalg.norm(outwards)
    first = np.cross(axis, [0.3, 0.5, 0.8])
    second = np.cross(axis, first / np.linalg.norm(first))
    offset = points - points.mean(axis=0)
    points = points[np.argsort(np.arctan2(offset @ second, offset @ (first / np.linalg.norm(first))))]

    def fan(first_at, scale):
        p = np.roll(points, -first_at, axis=0) * scale
        return sum(np.linalg.norm(np.cross(b - p[0], c - p[0])) / 2 for b, c in itertools.pairwise(p[1:]))

    largest = max(range(len(points)), key=lambda n: round(fan(n, (1, 1, 1)), 9))
    return fan(largest, spacing)


def naive_length(inside, spacing):
    height, width = spacing
    half_diagonal = math.hypot(height, width) / 2
    if len(inside) in (1, 3):
        return half_diagonal
    if len(inside) == 2:
        (a, b), (c, d) = inside
        return width if a == c else height if b == d else 2 * half_diagonal
    return 0.0


def naive_surface(mask, spacing, surface):
    """Places in mm and sizes of all elements."""
    wide = np.pad(mask.astype(bool), 1)
    places, sizes = [], []
    if surface == "voxel":
        for at in np.argwhere(wide):
            steps = [s * np.eye(mask.ndim, dtype=int)[a] for a in range(mask.ndim) for s in (-1, 1)]
            if not all(wide[tuple(at + s)] for s in steps):
                places.append(at * np.array(spacing))
                sizes.append(1.0)
        return np.array(places), np.array(sizes)
    for at in itertools.product(*(range(s - 1) for s in wide.shape)):
        corners = itertools.product((0, 1), repeat=mask.ndim)
        inside = frozenset(c for c in corners if wide[tuple(np.add(at, c))])
        size = (naive_length if mask.ndim == 2 else naive_area)(inside, spacing)
        if size:
            places.append(np.array(at) * np.array(spacing))
            sizes.append(size)
    return np.array(places), np.array(sizes)


def naive_metrics(prediction, reference, spacing, surface, tolerance):
    (p, p_sizes), (r, r_sizes) = (naive_surface(m, spacing, surface) for m in (prediction, reference))
    apart = np.array([[math.dist(a, b) for b in r] for a in p])
    both = [(apart.min(axis=1), p_sizes), (apart.min(axis=0), r_sizes)]
    total = p_sizes.sum() + r_sizes.sum()

    def percentile(mm, sizes):
        if surface == "voxel":
            return np.percentile(mm, 95)
        # the least distance within which 95 % of the surface lies
        return next(d for d in sorted(mm) if sizes[mm <= d + 1e-9].sum() >= (0.95 - 1e-9) * sizes.sum())

    return {
        "hd_mm": max(mm.max() for mm, _ in both),
        "hd95_mm": max(percentile(*one) for one in both),
        "assd_mm": sum((mm * sizes).sum() for mm, sizes in both) / total,
        "masd_mm": sum((mm * sizes).sum() / sizes.sum() for mm, sizes in both) / 2,
        "nsd": sum(sizes[mm <= tolerance + 1e-5 * min(spacing)].sum() for mm, sizes in both) / total,
    }


@quick
@given(pairs(side=4), st.sampled_from([0.1, 0.3, 0.8, 1.0, 2.0]))
def test_agreement_with_loops_over_all_pairs(pair, tolerance):
    prediction, reference, *_ = pair
    if prediction.any() and reference.any():
        found = row(*pair, tolerance=tolerance)
        for name, expected in naive_metrics(*pair, tolerance).items():
            assert getattr(found, name) == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_way_to_fill_a_cell_has_the_area_of_the_naive_derivation(spacing):
    areas = surfaces.surfel_areas(spacing)
    for code in range(256):
        inside = frozenset(c for n, c in enumerate(CORNERS) if code >> n & 1)
        assert areas[code] == pytest.approx(naive_area(inside, spacing), abs=1e-12), f"{code:08b}"


# ---- one result however computed


@pytest.fixture
def noise():
    generator = np.random.default_rng(0)
    return [(generator.random((9, 8, 7)) < share).astype(np.uint8) for share in (0.1, 0.4)]


@pytest.mark.parametrize("surface", SURFACES)
def test_a_tree_and_a_distance_transform_give_one_result(noise, surface, monkeypatch):
    monkeypatch.setattr(surfaces, "_TRANSFORM_US_PER_CELL", math.inf)
    tree = row(*noise, (0.8, 1.5, 3.0), surface)
    monkeypatch.setattr(surfaces, "_TRANSFORM_US_PER_CELL", 0)
    monkeypatch.setattr(surfaces, "cKDTree", None)
    assert same(tree, row(*noise, (0.8, 1.5, 3.0), surface), EVERY)


@pytest.mark.parametrize("surface", SURFACES)
def test_slabs_and_chunks_give_the_whole(noise, surface, monkeypatch):
    whole = row(*noise, (0.8, 1.5, 3.0), surface)
    monkeypatch.setattr(surfaces, "_SLAB_CELLS", 1)
    monkeypatch.setattr(surfaces, "_QUERIES", 3)
    assert same(whole, row(*noise, (0.8, 1.5, 3.0), surface), EVERY)


@pytest.mark.parametrize("within", [0.5, 1.6, 3.9])
def test_slabs_give_the_whole_rim(noise, within, monkeypatch):
    masks = [m > 0 for m in (noise[0], 1 - noise[0] * noise[1])]
    whole = boundary_iou(*masks, spacing_mm=(0.8, 1.5, 3.0), within_mm=within)
    monkeypatch.setattr(boundary, "_SLAB_VOXELS", 1)
    assert boundary_iou(*masks, spacing_mm=(0.8, 1.5, 3.0), within_mm=within) == whole


def test_the_order_of_memory_does_not_matter(noise):
    column = [np.asfortranarray(m) for m in noise]
    assert same(row(*noise, (0.8, 1.5, 3.0), "surfel"), row(*column, (0.8, 1.5, 3.0), "surfel"), EVERY)
    assert same(row(*noise, (0.8, 1.5, 3.0), "surfel"), row(noise[0], column[1], (0.8, 1.5, 3.0), "surfel"), EVERY)
