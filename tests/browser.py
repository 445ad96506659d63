"""Pages in a real browser: opened from disk in headless Chromium, and what happened on them; no test lives here."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# a machine without a graphics card draws WebGL on the processor
OPTIONS = ("--headless=new", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage")
LOCAL = ("file:", "data:", "blob:", "about:")
DESKTOP, PHONE = 1280, 390

Colour = tuple[float, float, float, float]


@dataclass(frozen=True)
class Visit:
    """An open page, what it complained of (console, errors, dialogs), and every address it asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        """The requests that went anywhere but to the file itself."""
        return [address for address in self.requests if not address.startswith(LOCAL)]


@dataclass(frozen=True)
class Text:
    """A piece of text as it is drawn: where, in which colour (0–1), and on which layers from the root upwards."""

    words: str
    element: str
    colour: Colour
    layers: Sequence[tuple[Colour, float]]
    size_px: float
    weight: float
    sign: bool = False

    @property
    def required(self) -> float:
        """Least contrast by WCAG 2.2 (AA), 1.4.3 for text and 1.4.11 for a sign such as an arrow.

        Large is from 18 pt, or from 14 pt in bold; 1 pt is 4/3 px.
        """
        large = self.sign or self.size_px >= 24 or (self.size_px >= 14 * 4 / 3 and self.weight >= 700)
        return 3.0 if large else 4.5

    @property
    def ratio(self) -> float:
        """Contrast of the text as it is seen."""
        return contrast(seen(self.layers, self.colour), seen(self.layers))


Visiting = Callable[..., Visit]
Browsing = Callable[..., Visit]


def find_chromium() -> str | None:
    """The first Chromium on the path."""
    return next(filter(None, map(shutil.which, EXECUTABLES)), None)


@contextmanager
def launch(executable: str) -> Iterator[Browser]:
    """A running browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(OPTIONS))
        yield browser
        browser.close()


class Visits:
    """Opens files from disk, each in a context of its own, and closes them all."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._contexts: list[BrowserContext] = []

    def open(self, path: Path, *, width: int = DESKTOP, dark: bool = False) -> Visit:
        """The page at `path`, loaded; `width` in CSS pixels."""
        return self.open_address(path.absolute().as_uri(), width=width, dark=dark)

    def open_address(self, address: str, *, width: int = DESKTOP, dark: bool = False) -> Visit:
        """The page at an address, loaded."""
        context = self._browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
        )
        context.set_default_timeout(10_000)
        self._contexts.append(context)
        visit = Visit(context.new_page())
        _listen(visit)
        visit.page.goto(address, wait_until="load")
        return visit

    def close(self) -> None:
        """Close every page that was opened."""
        while self._contexts:
            self._contexts.pop().close()


def texts(page: Page) -> list[Text]:
    """All text that is shown, each way of drawing once."""
    return [
        Text(
            found["words"],
            found["element"],
            found["colour"],
            [(tuple(layer["colour"]), layer["opacity"]) for layer in found["layers"]],
            found["size"],
            found["weight"],
            found["sign"],
        )
        for found in page.evaluate(_TEXTS)
    ]


def accessible(page: Page) -> list[tuple[str, str]]:
    """Role and name of everything in the tree that assistive software reads."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    return [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip()) for node in nodes if not node["ignored"]
    ]


def sideways(page: Page) -> int:
    """By how many pixels the page is wider than the window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def contrast(first: Sequence[float], second: Sequence[float]) -> float:
    """Contrast ratio of two colours (sRGB, 0–1), 1 to 21, by WCAG 2.2."""
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (0–1), by WCAG 2.2."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else math.pow((c + 0.055) / 1.055, 2.4) for c in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def seen(layers: Sequence[tuple[Colour, float]], text: Colour | None = None) -> tuple[float, ...]:
    """The colour at a point: `layers` are background and opacity of each element from the root inwards, over white.

    The opacity of an element holds for all that is inside, so text fades with it.
    """

    def paint(depth: int, below: tuple[float, ...]) -> tuple[float, ...]:
        if depth == len(layers):
            return below if text is None else _over(text, below)
        background, opacity = layers[depth]
        inside = paint(depth + 1, _over(background, below))
        return tuple(opacity * a + (1 - opacity) * b for a, b in zip(inside, below))

    return paint(0, (1.0, 1.0, 1.0))


def _over(colour: Colour, below: tuple[float, ...]) -> tuple[float, ...]:
    alpha = colour[3]
    return tuple(alpha * a + (1 - alpha) * b for a, b in zip(colour[:3], below))


def _listen(visit: Visit) -> None:
    def console(message: Any) -> None:
        if message.type in ("error", "warning", "assert"):
            visit.complaints.append(f"{message.type}: {message.text}")

    def dialog(box: Any) -> None:
        visit.complaints.append(f"dialog: {box.message}")
        box.dismiss()

    visit.page.on("console", console)
    visit.page.on("dialog", dialog)
    visit.page.on("pageerror", lambda error: visit.complaints.append(f"page error: {error}"))
    visit.page.on("request", lambda request: visit.requests.append(request.url))
    visit.page.on("websocket", lambda socket: visit.requests.append(socket.url))


# colours are read back from a canvas, which understands every way that CSS has of writing one
_TEXTS = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const rgba = css => {
    if (!known.has(css)) {
      context.clearRect(0, 0, 1, 1);
      context.fillStyle = css;
      context.fillRect(0, 0, 1, 1);
      known.set(css, [...context.getImageData(0, 0, 1, 1).data].map(value => value / 255));
    }
    return known.get(css);
  };
  const layers = element => {
    const found = [];
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      found.unshift({ colour: rgba(style.backgroundColor), opacity: Number(style.opacity) });
    }
    return found;
  };
  const shown = element => {
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) return false;
    const box = element.getBoundingClientRect();
    return box.width > 1 && box.height > 1;
  };
  const found = new Map();
  const add = (element, words, style, own) => {
    const colour = rgba(element instanceof SVGElement ? style.fill : style.color);
    const entry = {
      words: words.trim().slice(0, 40), sign: !/[\\p{L}\\p{N}]/u.test(words),
      element: `${element.tagName}.${element.className?.baseVal ?? element.className}`,
      colour, layers: own ? [...layers(element), own] : layers(element),
      size: parseFloat(style.fontSize), weight: Number(style.fontWeight),
    };
    found.set(JSON.stringify([entry.colour, entry.layers, entry.size, entry.weight]), entry);
  };
  for (const element of document.querySelectorAll("body, body *")) {
    if (element.matches("script, style, template, noscript, :disabled") || !shown(element)) continue;
    const style = getComputedStyle(element);
    for (const node of element.childNodes)
      if (node.nodeType === Node.TEXT_NODE && node.data.trim()) add(element, node.data, style);
    if (element.matches("input, textarea, select")) {
      add(element, element.value || "(a value)", style);
      if (element.placeholder) add(element, element.placeholder, getComputedStyle(element, "::placeholder"));
    }
    for (const place of ["::before", "::after"]) {
      const extra = getComputedStyle(element, place);
      if (/["']\\s*[^\\s"']/.test(extra.content))
        add(element, extra.content, extra, { colour: rgba(extra.backgroundColor), opacity: Number(extra.opacity) });
    }
  }
  return [...found.values()];
}"""
