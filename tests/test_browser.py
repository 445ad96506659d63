"""The pages as a reader meets them: opened from disk in a real browser, with a mouse, a keyboard, a phone, on paper."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from browser import DESKTOP, PHONE, Text, Visit, Visiting, accessible, contrast, seen, sideways, texts
from PIL import Image

from medseg.compare import compare
from medseg.evaluate import EvaluateOptions
from medseg.report import evaluate

BLACK, WHITE, CLEAR = (0.0, 0.0, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0)
CONTROLS = {"button", "checkbox", "combobox", "link", "listbox", "radio", "searchbox", "slider", "spinbutton", "switch"}
CONTROLS |= {"tab", "textbox", "DisclosureTriangle", "menuitem", "option", "region"}


@dataclass(frozen=True)
class Pages:
    """Folders of two reports of the same cases, and of their comparison."""

    ours: Path
    theirs: Path
    comparison: Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Pages with every part on them: eight cases of two labels, among them a missed, a spurious and an empty one, one
    unreadable and one without a prediction; patients, sites, lesions and calibration."""
    root = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    for name in ("ours", "theirs", "reference", "image", "probabilities"):
        (root / name).mkdir()
    for number in range(8):
        reference = np.zeros((20, 22, 18), np.uint8)
        reference[4:14, 5:15, 4:12] = 1
        reference[7:11, 8:12, 6:10] = 2
        ours = np.roll(reference, (0, 1, 2, 0, 0, 3, 1, 0)[number], axis=0)
        if number == 3:
            ours[ours == 2] = 1
        if number == 4:
            reference[reference == 2] = 1
        if number == 6:
            ours[ours == 2], reference[reference == 2] = 1, 1
        image = (reference * 60.0 + rng.normal(0, 10, reference.shape)).astype(np.float32)
        theirs = np.roll(reference, 1, axis=1)
        for name, array in (("ours", ours), ("theirs", theirs), ("reference", reference), ("image", image)):
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.5, 1.0])), root / name / f"case_{number}.nii.gz")
        # sure by 0.9 of what was predicted; as nnU-Net writes it: channels first, axes in reverse order
        sure = np.full((3, *ours.T.shape), 0.05, np.float32)
        np.put_along_axis(sure, ours.T[None].astype(int), 0.9, axis=0)
        np.savez(root / "probabilities" / f"case_{number}.npz", probabilities=sure)
    (root / "ours" / "case_0.nii.gz").write_bytes(b"not a volume")
    (root / "ours" / "case_7.nii.gz").unlink()
    rows = [f"case_{number},patient {number // 2},{'north' if number < 5 else 'south'}" for number in range(8)]
    (root / "cases.csv").write_text("\n".join(["case,patient,site", *rows]))
    made = {}
    for name in ("ours", "theirs"):
        options = EvaluateOptions(
            labels={"shell": 1, "core": 2},
            allow_missing=True,
            lesions="default",
            probabilities=root / "probabilities" if name == "ours" else None,
        )
        report = evaluate(root / name, root / "reference", options, images=root / "image", metadata=root / "cases.csv")
        made[name] = report.save(root / "reports" / name)
    return Pages(**made, comparison=compare(made).save(root / "comparison"))


@pytest.fixture(scope="module")
def report(pages: Pages) -> Path:
    """The page of a report."""
    return pages.ours / "report.html"


@pytest.fixture(scope="module", params=["report", "comparison"])
def any_page(request, pages: Pages) -> Path:
    """Each kind of page."""
    return pages.ours / "report.html" if request.param == "report" else pages.comparison / "compare.html"


def column(page, number: int) -> list[str]:
    """The cells of a column of the case table, from above, of the rows that are shown."""
    return page.evaluate(
        "n => [...document.querySelectorAll('#cases tbody tr')].filter(row => !row.hidden)"
        ".map(row => row.cells[n].innerText.trim())",
        number,
    )


def heads(page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('#cases thead th')].map(h => h.innerText.trim())")


def number(text: str) -> float:
    """What a cell says, NaN for a dash."""
    return {"–": math.nan, "∞": math.inf}.get(text) or float(text.replace("−", "-"))


def test_contrast_is_that_of_the_guideline():
    assert contrast(BLACK, WHITE) == pytest.approx(21)
    # #777 on white: 0x77/255 = 0.4667 → linear 0.1845; 1.05 / 0.2345 = 4.478, just too little
    assert contrast((119 / 255,) * 3, WHITE) == pytest.approx(4.478, abs=1e-3)


def test_opacity_of_an_element_fades_its_text_into_what_lies_below():
    # black text at half opacity on nothing, over white: half grey
    assert seen([(WHITE, 1.0), (CLEAR, 0.5)], BLACK) == pytest.approx((0.5, 0.5, 0.5))


def test_large_text_needs_less_contrast():
    small, large, bold = (Text("", "", BLACK, (), size, weight) for size, weight in ((23, 400), (24, 400), (19, 700)))
    assert (small.required, large.required, bold.required) == (4.5, 3.0, 3.0)


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_opens_without_complaint_and_asks_nothing_of_anybody(any_page, visit: Visiting, width):
    opened = visit(any_page, width=width)
    opened.page.wait_for_timeout(300)
    assert opened.complaints == []
    assert opened.requests
    assert opened.left == []


def test_every_column_sorts_both_ways(report, visit: Visiting):
    page = visit(report).page
    names = heads(page)
    for n, name in enumerate(names):
        button = page.locator("#cases thead th").nth(n).locator("button")
        for _ in range(2):
            button.click()
            direction = page.locator("#cases thead th").nth(n).get_attribute("aria-sort")
            cells = column(page, n)
            assert page.locator("#cases thead th[aria-sort]").count() == 1
            if n < 3:
                expected = sorted(cells, key=str.lower, reverse=direction == "descending")
                assert cells == expected, (name, direction)
            else:
                values = [number(cell) for cell in cells]
                defined = [value for value in values if not math.isnan(value)]
                assert defined == sorted(defined, reverse=direction == "descending"), (name, direction)
                # what is not defined is last in both directions
                assert all(math.isnan(value) for value in values[len(defined) :]), (name, direction)


def test_search_leaves_the_rows_that_hold_all_words(report, visit: Visiting):
    page = visit(report).page
    everything = list(zip(*(column(page, n) for n in range(3))))
    for words in ("case_3", "core", "missed", "SPURIOUS", "case_3 shell"):
        page.locator("#find").fill(words)
        expected = [row for row in everything if all(word.lower() in " ".join(row).lower() for word in words.split())]
        assert 0 < len(expected) < len(everything)
        assert list(zip(*(column(page, n) for n in range(3)))) == expected, words
        assert str(len(expected)) in page.locator("#found").inner_text()


@pytest.mark.parametrize(("name", "chosen", "cell"), [("Label", "core", 1), ("Status", "missed", 2)])
def test_a_filter_leaves_the_rows_of_its_kind(report, visit: Visiting, name, chosen, cell):
    page = visit(report).page
    everything = column(page, cell)
    page.get_by_role("combobox", name=name).select_option(label=chosen)
    assert column(page, cell) == [chosen] * everything.count(chosen)
    assert 0 < everything.count(chosen) < len(everything)
    page.get_by_role("combobox", name=name).select_option(index=0)
    assert column(page, cell) == everything


def test_search_and_filters_work_together(report, visit: Visiting):
    page = visit(report).page
    page.get_by_role("combobox", name="Label").select_option(label="core")
    page.locator("#find").fill("case_2")
    assert [column(page, n) for n in range(3)] == [["case_2"], ["core"], ["ok"]]


def test_sorting_keeps_what_was_filtered(report, visit: Visiting):
    page = visit(report).page
    page.locator("#find").fill("core")
    before = column(page, 0)
    page.locator("#cases thead button").first.click()
    assert column(page, 1) == ["core"] * len(before)
    assert column(page, 0) == sorted(before)


def test_a_case_opens_from_the_table(report, visit: Visiting):
    page = visit(report).page
    link = page.locator("#cases tbody a", has_text="case_3").first
    link.focus()
    page.keyboard.press("Enter")
    card = page.locator(":target")
    page.wait_for_function("document.querySelector(':target').getBoundingClientRect().top < innerHeight / 2")
    assert card.locator("h3").inner_text() == "case_3"
    assert card.locator("img").count() == 3
    assert card.locator("img").first.evaluate("picture => picture.complete && picture.naturalWidth > 0")


def test_a_measure_is_chosen_by_keyboard(report, visit: Visiting):
    page = visit(report).page
    shown = page.locator("#by-label-section .panel:visible")
    assert shown.count() == 1
    first = shown.get_attribute("data-metric")
    page.locator("[name=measure]:checked").focus()
    page.keyboard.press("ArrowRight")
    assert shown.count() == 1
    assert shown.get_attribute("data-metric") not in (first, None)


def test_the_theme_can_be_turned(any_page, visit: Visiting):
    page = visit(any_page).page
    assert min(seen(texts(page)[0].layers)) > 0.8
    page.locator("#theme").click()
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    assert max(seen(texts(page)[0].layers)) < 0.2


def test_without_a_script_the_page_is_whole(report, chromium):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("#cases tbody tr").count() == 14
    assert page.locator("[type=search]:visible, select:visible, canvas:visible, #theme:visible").count() == 0
    context.close()


def test_a_search_without_a_hit_says_so(report, visit: Visiting):
    page = visit(report).page
    page.locator("#find").fill("nothing of that name")
    assert column(page, 0) == []
    assert page.locator("#found").inner_text().startswith(("0", "No", "no"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_all_text_stands_out_enough(any_page, visit: Visiting, width, dark):
    page = visit(any_page, width=width, dark=dark).page
    unfold(page)
    found = texts(page)
    assert len(found) > 10
    assert [f"{t.words!r} in {t.element}: {t.ratio:.2f}" for t in found if t.ratio < t.required] == []


def test_dark_is_dark(any_page, visit: Visiting):
    backs = [seen(texts(visit(any_page, dark=dark).page)[0].layers) for dark in (False, True)]
    assert min(backs[0]) > 0.8
    assert max(backs[1]) < 0.2


def test_the_page_never_scrolls_sideways(any_page, visit: Visiting):
    page = visit(any_page).page
    unfold(page)
    # 320: WCAG 2.2, 1.4.10 (reflow)
    widths, wider = (320, PHONE, 768, 1024, DESKTOP), []
    for width in widths:
        page.set_viewport_size({"width": width, "height": 900})
        wider.append(sideways(page))
    assert dict(zip(widths, wider)) == dict.fromkeys(widths, 0)


def unfold(page) -> None:
    """Open everything that can be folded."""
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")


def test_everything_that_acts_has_a_name(any_page, visit: Visiting):
    page = visit(any_page).page
    unfold(page)
    named = accessible(page)
    assert {"main", "heading", "table", "button"} <= {role for role, _ in named}
    assert [role for role, name in named if role in CONTROLS and not name] == []
    assert [role for role, name in named if role in ("image", "graphics-document") and not name] == []
    assert page.locator("img:not([alt])").count() == 0


def test_headings_go_down_one_step_at_a_time(any_page, visit: Visiting):
    page = visit(any_page).page
    unfold(page)
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_landmarks_language_and_title(any_page, visit: Visiting):
    page = visit(any_page).page
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.title()
    assert page.locator("main").count() == 1
    assert page.evaluate(_OUTSIDE_LANDMARKS) == []


_OUTSIDE_LANDMARKS = """() => [...document.body.children]
  .filter(e => !e.matches("main, header, footer, nav, aside, script, style, dialog, template, a[href='#content']"))
  .filter(e => e.checkVisibility() && e.innerText.trim()).map(e => e.outerHTML.slice(0, 80))"""
_FOCUSABLE = """() => {
  const controls = [...document.querySelectorAll(
    "a[href], button, input, select, textarea, summary, canvas[tabindex], [tabindex]")].filter(e =>
    e.tabIndex >= 0 && !e.disabled && !e.closest("[inert]") && e.checkVisibility({ visibilityProperty: true }));
  // of a group of radio buttons the keyboard stops at one
  window.controls = controls.filter(e => e.type !== "radio" || e.checked);
  return window.controls.length;
}"""
_FOCUSED = """() => {
  const element = document.activeElement, style = getComputedStyle(element);
  return {
    number: window.controls.indexOf(element), body: element === document.body, name: element.outerHTML.slice(0, 100),
    ring: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
  };
}"""


def test_the_keyboard_reaches_every_control_and_shows_where_it_is(any_page, visit: Visiting):
    page = visit(any_page).page
    expected = page.evaluate(_FOCUSABLE)
    reached, unseen = set(), []
    for _ in range(expected + 5):
        page.keyboard.press("Tab")
        focused = page.evaluate(_FOCUSED)
        if focused["body"]:
            break
        reached.add(focused["number"])
        if not focused["ring"]:
            unseen.append(focused["name"])
    assert unseen == []
    assert reached == set(range(expected))


def test_the_keyboard_sorts_and_filters(report, visit: Visiting):
    page = visit(report).page
    dice = heads(page).index("Dice")
    head = page.locator("#cases thead th").nth(dice)
    before = head.get_attribute("aria-sort")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") not in (before, None)
    page.locator("#find").focus()
    page.keyboard.type("missed")
    assert set(column(page, 2)) == {"missed"}


def test_paper_shows_everything(any_page, visit: Visiting):
    page = visit(any_page, dark=True).page
    # A4 less margins of 12 mm, at 96 pixels an inch
    page.set_viewport_size({"width": round((210 - 24) / 25.4 * 96), "height": 1000})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(_FOLDED) == []
    assert page.evaluate(_CUT_OFF) == []
    assert sideways(page) == 0
    # nothing to press, but for the headings that sort
    assert page.locator("[type=search]:visible, select:visible, canvas:visible").count() == 0
    assert page.locator("button:visible:not(th button)").count() == 0
    assert min(seen(texts(page)[0].layers)) > 0.9
    assert [(t.words, t.ratio) for t in texts(page) if t.ratio < t.required] == []


_FOLDED = """() => [...document.querySelectorAll("details > :not(summary)")]
  .filter(e => !e.checkVisibility()).map(e => e.outerHTML.slice(0, 80))"""
# what scrolls on a screen is lost on paper; `unseen` is for screen readers only
_CUT_OFF = """() => [...document.querySelectorAll("main *")]
  .filter(e => !e.matches(".unseen, .unseen *") && e.clientHeight && getComputedStyle(e).overflowY !== "visible")
  .filter(e => e.scrollHeight > e.clientHeight + 1 || e.scrollWidth > e.clientWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))"""


def test_the_tests_of_a_comparison_sort_and_filter(pages: Pages, visit: Visiting):
    page = visit(pages.comparison / "compare.html").page
    rows = page.locator("#test-table tbody tr:visible")
    everything = rows.count()
    page.locator("[data-filter=test-table]").fill("core Dice")
    assert 0 < rows.count() < everything
    assert {"core", "Dice"} <= set(rows.first.inner_text().split())
    page.locator("[data-filter=test-table]").fill("")
    head = page.locator("#test-table thead th", has_text="Difference")
    head.locator("button").click()
    place = page.evaluate("[...document.querySelectorAll('#test-table thead th[aria-sort]')].map(h => h.cellIndex)")
    assert len(place) == 1
    cells = page.locator(f"#test-table tbody tr td:nth-child({place[0] + 1})").all_inner_texts()
    values = [number(cell.replace("+", "").split()[0]) for cell in cells]
    defined = [value for value in values if not math.isnan(value)]
    assert defined == sorted(defined, reverse=head.get_attribute("aria-sort") == "descending")


# the 3D viewer


def opened_viewer(report: Path, visit: Visiting, *, width: int = 500) -> Visit:
    """The page with its viewer open; narrow, for the processor has to draw it."""
    opened = visit(report, width=width)
    opened.page.locator("#viewer .open").click()
    opened.page.wait_for_selector("#viewer canvas[data-state=ready]", timeout=20_000)
    return opened


def drawn(page) -> np.ndarray:
    """What the viewer's canvas shows, (height, width, 3) in 0–255."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return np.asarray(Image.open(io.BytesIO(page.locator("#viewer canvas").screenshot())).convert("RGB")).astype(int)


def changed(before: np.ndarray, after: np.ndarray) -> float:
    """Share of pixels that look different: by more than rounding in any channel."""
    return float((np.abs(before - after).max(-1) > 8).mean())


def test_the_viewer_draws_and_each_layer_shows(report, visit: Visiting):
    opened = opened_viewer(report, visit)
    page = opened.page
    whole = drawn(page)
    # grey anatomy and coloured labels on a dark ground
    assert len(np.unique(whole.reshape(-1, 3), axis=0)) > 100
    assert ((whole.max(-1) - whole.min(-1)) > 40).mean() > 0.005
    for layer in ("image", "reference", "prediction"):
        button = page.locator(f"#viewer [data-layer={layer}]")
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert changed(whole, drawn(page)) > 0.001, layer
        button.click()
        assert changed(whole, drawn(page)) < 0.001, layer
    page.locator("#viewer [data-layer=errors]").click()
    assert changed(whole, drawn(page)) > 0.001
    assert opened.complaints == []
    assert opened.left == []


def test_the_viewer_changes_with_the_case_and_the_view(report, visit: Visiting):
    page = opened_viewer(report, visit).page
    first = drawn(page)
    page.locator("#viewer [data-view=solid]").click()
    assert changed(first, drawn(page)) > 0.05
    page.locator("#viewer [data-view=planes]").click()
    page.locator("#viewer select").select_option(index=1)
    page.wait_for_selector("#viewer canvas[data-state=ready]")
    assert changed(first, drawn(page)) > 0.01


def test_the_keyboard_moves_the_crosshair_and_leaves_the_viewer(report, visit: Visiting):
    page = opened_viewer(report, visit).page
    canvas = page.locator("#viewer canvas")
    canvas.focus()
    before, told = drawn(page), page.locator("#viewer output").inner_text()
    page.keyboard.press("ArrowUp")
    assert page.locator("#viewer output").inner_text() != told
    assert changed(before, drawn(page)) > 0.0005
    page.keyboard.press("Tab")
    assert not canvas.evaluate("canvas => canvas === document.activeElement")


def test_the_open_viewer_fits_a_phone_and_reads_well(report, visit: Visiting):
    page = opened_viewer(report, visit, width=PHONE).page
    assert sideways(page) == 0
    assert [(t.words, t.ratio) for t in texts(page) if t.ratio < t.required] == []
