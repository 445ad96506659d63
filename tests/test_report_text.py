"""How numbers, names and data are written on a page."""

from __future__ import annotations

import json
import math

import pytest

from medseg.report.page import breakable, embedded, environment, figure, fixed, moment, options, signed, worded


def test_numbers_for_the_eye():
    values = (0.12345, None, math.nan, "inf", math.inf, "-inf", -math.inf, -0.5, -0.0001)
    assert [fixed(v) for v in values] == ["0.123", "–", "–", "∞", "∞", "−∞", "−∞", "−0.500", "0.000"]


def test_signs_of_differences():
    assert [signed(v) for v in (1.0, -0.256, 0.0, None, math.inf)] == ["+1.00", "−0.26", "0.00", "–", "∞"]


def test_each_metric_has_its_digits():
    shown = [
        figure(1.23456, metric) for metric in ("dice", "hd95_mm", "volume_difference_ml", "relative_volume_difference")
    ]
    assert shown == ["1.235", "1.23", "+1.23", "+1.235"]


def test_long_names_break_after_underscores_and_stay_escaped():
    assert breakable("left_<b>lung") == "left_<wbr>&lt;b&gt;lung"


def test_options_of_the_command_line_are_set_as_code():
    assert options("<i> pass --allow-missing now") == "&lt;i&gt; pass <code>--allow-missing</code> now"


def test_a_dash_inside_a_name_is_no_option():
    assert options("case--one.nii") == "case--one.nii"


def test_embedded_data_cannot_end_its_element_and_comes_back_whole():
    data = {"</script><!--": "ü\u2028&"}
    text = embedded(data)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == data


def test_embedded_data_refuses_what_json_has_no_word_for():
    with pytest.raises(ValueError, match="JSON compliant"):
        embedded(math.nan)


def test_templates_escape_every_value():
    assert environment().from_string("{{ x }}").render(x="<b>") == "&lt;b&gt;"


def test_definitions_are_told_in_the_words_of_the_page():
    text = worded("both_empty: neither. missing_prediction: none. Written as inf (n_finite); <b> of an infant")
    assert text == (
        "both empty: neither. no prediction: none. Written as ∞ (<code>n_finite</code>); &lt;b&gt; of an infant"
    )


def test_a_time_is_told_without_its_machine_form():
    assert moment("2024-05-31T20:04:59+02:00") == "2024-05-31 18:04 UTC"
