"""Charts: where a value lies on an axis, what is written beside it, and what the SVG holds."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from medseg.report.charts import (
    MAX_DOTS,
    MAX_DOTS_OF_ALL,
    Axis,
    axis,
    dots_per_label,
    number,
    reliability,
    scatter,
    share_axis,
    spread,
    strip,
)


def dots(svg):
    """Where the dots of a chart are."""
    return [(float(x), float(y)) for x, y in re.findall(r"M([\d.e+-]+) ([\d.e+-]+)h", str(svg))]


def test_an_axis_begins_at_zero_and_ends_a_little_after_the_last_value():
    scale = axis([2.0, 10.0])
    assert (scale.low, scale.high, scale.log) == (0, 10.5, False)
    assert scale.place(5.25) == pytest.approx(0.5)


def test_an_axis_of_values_over_decades_is_logarithmic():
    scale = axis([1.0, 100.0])
    assert scale.log
    # 10 is the geometric middle of 1 and 100
    assert scale.place(10) == pytest.approx(0.5)


def test_an_axis_with_negative_values_is_linear_and_reaches_below_them():
    scale = axis([-100.0, 1.0, 100.0])
    assert not scale.log
    assert scale.low == pytest.approx(-110)


def test_zero_has_a_lane_before_a_logarithmic_axis():
    scale = axis([0.0, 1.0, 100.0])
    assert 0 < scale.place(0) < scale.place(1)
    assert scale.ticks[0] == (scale.place(0), "0")


def test_infinity_has_a_lane_after_all_finite_values():
    scale = axis([0.0, 4.0, math.inf])
    assert scale.place(4) < scale.place(math.inf) <= 1
    assert scale.ticks[-1] == (scale.place(math.inf), "∞")


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf]])
def test_without_a_finite_value_an_axis_goes_from_zero(values):
    scale = axis(values)
    assert (scale.low, scale.place(scale.low)) == (0, 0)


def test_an_axis_of_equal_values_has_a_length():
    assert axis([0.0, 0.0]).place(0) == 0


@pytest.mark.parametrize(
    ("values", "start"),
    [([0.63, 0.9], 0.6), ([0.6], 0.6), ([0.99], 0.8), ([0.0, 1.0], 0.0), ([math.nan], 0.0), ([], 0.0)],
)
def test_the_axis_of_shares_starts_at_the_fifth_below_the_lowest(values, start):
    scale = share_axis(values)
    assert (scale.low, scale.high) == (pytest.approx(start), 1)


def test_linear_ticks_are_round_numbers_inside():
    assert [text for _, text in Axis(0, 1).ticks] == ["0", "0.25", "0.5", "0.75", "1"]
    assert [text for _, text in Axis(-1.9, 0.7).ticks] == ["−1", "0"]


def test_logarithmic_ticks_are_powers_or_parts_of_them():
    assert [text for _, text in Axis(1, 1000, log=True).ticks] == ["1", "10", "100", "1000"]
    assert [text for _, text in Axis(1, 40, log=True).ticks] == ["1", "3", "10", "30"]


def test_numbers_are_short_and_have_a_minus_sign():
    assert [number(v) for v in (0.25, 12345.0, -0.5, 0.00002, 0.0)] == ["0.25", "12345", "−0.5", "0.00002", "0"]


def test_of_very_many_values_evenly_many_are_taken_with_both_ends():
    values = np.linspace(1, 0, 1000)
    chosen = spread(values, 11)
    assert len(chosen) == 11
    assert (values[chosen[0]], values[chosen[-1]]) == (0, 1)


def test_undefined_values_have_no_dot():
    assert spread(np.array([math.nan, 2.0, 1.0]), 10).tolist() == [2, 1]


def test_a_page_of_many_labels_has_fewer_dots_for_each():
    assert dots_per_label(1) == MAX_DOTS
    assert dots_per_label(100) == MAX_DOTS_OF_ALL // 100


def test_a_strip_has_a_dot_per_case_that_knows_its_row():
    svg = strip(np.array([0.5, 0.25]), Axis(0, 1), "words", rows=[7, 8], limit=10, box=None)
    assert [x for x, _ in dots(svg)] == [250, 500]
    assert 'data-rows="8 7"' in svg


def test_a_box_spans_the_quartiles():
    svg = strip(np.array([0.5]), Axis(0, 1), "words", rows=[0], limit=10, box=(0.25, 0.5, 0.75))
    assert '<rect class="box" x="25.00%" width="50.00%"' in svg
    assert '<line class="median" x1="50.00%"' in svg


def test_a_box_that_reaches_infinity_ends_in_its_lane():
    scale = Axis(0, 10, infinite=True)
    svg = strip(np.array([1.0]), scale, "words", rows=[0], limit=10, box=(0.0, 1.0, math.inf))
    assert f'x="0.00%" width="{100 * scale.place(math.inf):.2f}%"' in svg


def test_what_a_chart_says_cannot_become_markup():
    svg = strip(np.array([0.5]), Axis(0, 1), '"><script>', rows=[0], limit=10, box=None)
    assert "<script>" not in svg


def test_a_scatter_leaves_out_what_has_no_place():
    x, y = np.array([1.0, math.nan, 3.0]), np.array([1.0, 1.0, math.nan])
    svg = scatter(x, y, Axis(0, 4), Axis(0, 1), "words", titles=("x", "y"), rows=[0, 1, 2], limit=10)
    assert len(dots(svg)) == 1


def test_larger_values_lie_further_right_and_further_up():
    x, y = np.array([1.0, 3.0]), np.array([0.25, 0.75])
    svg = scatter(x, y, Axis(0, 4), Axis(0, 1), "words", titles=("x", "y"), rows=[0, 1], limit=10)
    (x_1, y_1), (x_2, y_2) = dots(svg)
    assert x_1 < x_2
    assert y_1 > y_2


def test_a_reliability_diagram_has_a_dot_for_each_bin_that_holds_voxels():
    bins = [
        {"low": 0.0, "high": 0.5, "n": 0, "confidence": None, "correct": None},
        {"low": 0.5, "high": 1.0, "n": 9, "confidence": 0.75, "correct": 0.75},
    ]
    svg = reliability(bins, "words")
    (x, y), ends = dots(svg)[0], re.search(r'class="even" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    left, bottom, right, top = map(float, ends.groups())
    # honest: three quarters of the way along the diagonal, and drawn to a tenth of a unit
    assert x == pytest.approx(left + 0.75 * (right - left), abs=0.1)
    assert y == pytest.approx(bottom + 0.75 * (top - bottom), abs=0.1)
    assert str(svg).count('class="bar"') == 1
