"""Left and right: labels that tell them apart, and settings that would mirror or turn images all the same."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain
from string import ascii_lowercase
from typing import Any

from medseg.cases import Labels
from medseg.config import BACKGROUND, IGNORE, Config, DataConfig, PreprocessConfig
from medseg.errors import ConfigError

log = logging.getLogger(__name__)

Pairs = tuple[tuple[str, str], ...]

# Left and right as `_plain` writes them. A false alarm costs a little augmentation, a miss mixes up left and right: so
# what is long counts anywhere in a name
STEMS: Pairs = (
    ("left", "right"),
    ("link", "recht"),
    ("gauche", "droit"),
    ("sinist", "dext"),
    ("sinist", "destr"),
    ("izq", "derech"),
    ("esquer", "direit"),
    ("esquer", "dret"),
    ("stang", "drept"),
    ("vanster", "hoger"),
    ("venstre", "høyr"),
    ("venstre", "højr"),
    ("vasen", "oikea"),
    ("vasem", "oikea"),
    ("αριστερ", "δεξι"),
    ("左", "右"),
    ("왼", "오른"),
    ("좌", "우"),
    ("يسار", "يمين"),
    ("يسر", "يمن"),
    ("שמאל", "ימין"),
    ("שמאל", "ימני"),
)
# where a word begins, since others have it in their middle: плевра is the pleura
BEGINNINGS: Pairs = (
    ("лев", "прав"),
    ("слев", "справ"),
    ("лів", "прав"),
    ("ляв", "десн"),
    ("ляв", "дясн"),
    ("lew", "praw"),
    ("lijev", "desn"),
    ("kair", "desin"),
)
WORDS: Pairs = (
    ("l", "r"),
    ("lt", "rt"),
    ("lh", "rh"),
    ("lft", "rgt"),
    ("sx", "dx"),
    ("leva", "prava"),
    ("levy", "pravy"),
    ("leve", "prave"),
    ("levo", "pravo"),
)
# words that mean other things too: only beside the same name with the other word
PAIRED: Pairs = (
    ("g", "d"),
    ("e", "d"),
    ("i", "d"),
    ("s", "d"),
    ("v", "h"),
    ("li", "re"),
    ("sin", "dex"),
    ("sol", "sag"),
    ("os", "od"),
    ("lava", "prava"),
    ("lavy", "pravy"),
    ("bal", "jobb"),
)


def _any(pairs: Pairs) -> str:
    return "|".join(sorted(set(chain.from_iterable(pairs))))


LETTER = r"[^\W\d_]"
SIDED = re.compile(
    rf"{_any(STEMS)}|(?<!{LETTER})(?:{_any(BEGINNINGS)})|(?<!{LETTER})(?:{_any(WORDS)})(?!{LETTER})",
)
# a letter before a word or a lobe of the lung, as in LKidney and RUL
INITIAL = re.compile(r"(^|[^A-Za-z])[LR]([A-Z][a-z]|[UML]L($|[^A-Za-z]))")
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
# settings that have a number for each axis, or count axes; what was made for some order of them fits no other
BY_AXIS = (
    ("preprocess", "spacing_mm"),
    ("preprocess", "shape"),
    ("windows", "patch_size"),
    ("augment", "rotation_deg"),
)
FLIPS = ("augment", "flip_axes")


def sided_label(data: DataConfig) -> str | None:
    """The first label whose name tells left from right, if any does, alone or beside the name of the other side."""
    return _sided(data.foreground)


def why_unmirrored(labels: Labels | None) -> str | None:
    """Why images with these labels are not to be mirrored; None: they may be. No `labels` at all: without names."""
    names = [name for name in labels or {} if name not in (BACKGROUND, IGNORE)]
    if sided := _sided(names):
        return f"label `{sided}` tells sides apart"
    if not labels or (len(names) > 1 and all(name == f"label_{labels[name]}" for name in names)):
        return "the labels have no names: two of them may be the two sides of one organ"
    return None


def keep_sides(
    config: Config, *, source: str, typed: bool, begun: tuple[int, ...] = ()
) -> tuple[Config, dict[str, str]]:
    """`config` without axes to mirror along where that mixes up the labels, and the reason if there were some.

    What was `typed` is meant: it holds, with a warning. Axes that a training was `begun` with hold too. `source`: where
    the others stand.
    """
    axes = config.augment.flip_axes if config.augment.p_flip else ()
    if set(axes) <= set(begun):
        return config, {}
    orient, dims = config.preprocess.orient, config.data.spatial_dims
    why = _why_not(axes, config.data.labels, spatial_dims=dims, orient=orient)
    if why is None:
        return config, {}
    if typed:
        log.warning("augment.flip_axes %s is used as asked for, although %s", list(axes), why)
        return config, {}
    _tell_left_out(source, axes, why)
    augment = config.augment.model_copy(update={"flip_axes": begun})
    return config.model_copy(update={"augment": augment}), {"augment.flip_axes": f"{why}: never mirrored"}


def is_turned(*given: Mapping[str, Any]) -> bool:
    """Whether the axes of volumes are turned, as settings that are laid over each other say."""
    said = [orient for values in given if (orient := _given(values, ("preprocess", "orient"))) is not None]
    return PreprocessConfig.model_validate({"orient": said[-1]} if said else {}).orient


def refuse_other_axes(values: Mapping[str, Any], typed: Mapping[str, Any], *, source: str, spatial_dims: int) -> None:
    """Raises `ConfigError` where `typed` turns the axes otherwise than `source`, whose `values` count them.

    What is the same along all axes fits any order, and what was typed beside is meant for the new one. Only volumes are
    turned.
    """
    was, now = is_turned(values), is_turned(values, typed)
    if was == now or spatial_dims != 3:
        return
    given = {path: _given(values, path) for path in (*BY_AXIS, FLIPS) if _given(typed, path) is None}
    uneven = [
        ".".join(path)
        for path, value in given.items()
        if value and (len(set(value)) not in (0, 3) if path == FLIPS else len(set(value)) > 1)
    ]
    if uneven:
        raise ConfigError(
            f"--set preprocess.orient={str(now).lower()}: {source} has {', '.join(uneven)} for axes in the order of "
            f"preprocess.orient {str(was).lower()}; leave the file out to plan anew, or --set these too"
        )


def _given(values: Mapping[str, Any], path: tuple[str, str]) -> Any:
    section, key = path
    return (values.get(section) or {}).get(key)


def _why_not(axes: Sequence[int], labels: Labels, *, spatial_dims: int, orient: bool) -> str | None:
    """Why not to mirror along `axes`; None: nothing is mixed up. Only in turned volumes it is known what they are."""
    if not axes or (spatial_dims == 3 and orient and 0 not in axes):
        return None
    return why_unmirrored(labels)


def _tell_left_out(source: str, axes: Iterable[int], why: str) -> None:
    listed = ",".join(map(str, axes))
    log.warning(
        "%s: augment.flip_axes [%s] is left out, since %s; --set augment.flip_axes=[%s] mirrors all the same",
        *(source, listed, why, listed),
    )


def _sided(names: Iterable[str]) -> str | None:
    """The first of `names` that tells a side by itself, or beside another that has the other side in its place."""
    plain = {name: _plain(name) for name in names}
    others = {_folded(text) for text in plain.values()}
    for name, text in plain.items():
        folded = _folded(text)
        if SIDED.search(folded) or INITIAL.search(text) or not others.isdisjoint(_swapped(folded, others)):
            return name
    return None


def _plain(name: str) -> str:
    """A name without accents, words in camel case set apart; letters that look alike are the same."""
    apart = unicodedata.normalize("NFKD", name)
    bare = "".join(letter for letter in apart if unicodedata.category(letter) != "Mn")
    return unicodedata.normalize("NFC", CAMEL.sub(" ", bare))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text.casefold())


def _swapped(name: str, others: AbstractSet[str]) -> Iterator[str]:
    """`name` with one `l` or `r`, or one of the paired words, replaced by its partner.

    No single letter where `others` have a third in its place: they are listed by letters.
    """
    swap = {"l": "r", "r": "l"}
    for at, letter in enumerate(name):
        if letter in swap:
            yield name[:at] + swap[letter] + name[at + 1 :]
    words = re.split(f"({LETTER}+)", name)
    for at, word in enumerate(words):
        for pair in (pair for pair in PAIRED if word in pair):
            thirds = set(ascii_lowercase) - set(pair) if len(word) == 1 else ()
            beside = {other: "".join([*words[:at], other, *words[at + 1 :]]) for other in (*thirds, *pair)}
            if others.isdisjoint(beside[third] for third in thirds):
                yield beside[pair[word == pair[0]]]
