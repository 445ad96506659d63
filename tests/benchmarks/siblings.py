"""What folds drawn at random flatter where crops of one person lie on both sides: the hippocampus data.

    cd tests/benchmarks
    python siblings.py draw FOLDER AT_RANDOM
    python recipe.py FOLDER variants/none.yaml -o by_subject.json --folds 0 1 2 3 4
    python recipe.py AT_RANDOM variants/none.yaml -o at_random.json --folds 0 1 2 3 4
    python siblings.py compare FOLDER by_subject.json at_random.json -o RESULT.json

FOLDER has folds that keep a person's crops, numbers 2k - 1 and 2k, together. `draw` makes a folder of links to it whose
folds are drawn as nnU-Net draws them: all names in order, shuffled by numpy with seed 12345, cut into five. Every case
is held back once in both, so `compare` pairs the Dice by case; apart from each other stand those whose sibling was
trained on at random, and those that have none or whose sibling was held back with them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from recipe import USUAL, mean, merged

import medseg

SPLITS = "splits_final.json"
SEED, FOLDS = 12345, 5
# of the rows of recipe.py
KINDS = {"cases": "no copies", "mirrored_cases": "mirrored copies"}

Splits = Sequence[Mapping[str, Sequence[str]]]


def main() -> None:
    """Draw folds, or compare what was trained on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    drawing = verbs.add_parser("draw")
    drawing.add_argument("folder", type=Path)
    drawing.add_argument("at_random", type=Path)
    comparing = verbs.add_parser("compare")
    comparing.add_argument("folder", type=Path)
    comparing.add_argument("by_subject", type=Path)
    comparing.add_argument("at_random", type=Path)
    comparing.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    splits = json.loads((arguments.folder / SPLITS).read_text())
    if arguments.verb == "draw":
        draw(splits, arguments.folder.resolve(), arguments.at_random)
    else:
        ways = [json.loads(path.read_text()) for path in (arguments.by_subject, arguments.at_random)]
        result = compare(*ways, drawn(splits))
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["table"], indent=1))


def draw(splits: Splits, folder: Path, made: Path) -> None:
    """A folder of links to the files in `folder`, with folds drawn at random."""
    made.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name != SPLITS:
            (made / path.name).symlink_to(path)
    (made / SPLITS).write_text(json.dumps(drawn(splits), indent=1) + "\n")


def drawn(splits: Splits) -> list[dict[str, list[str]]]:
    """Folds drawn at random over all cases that the given ones hold back."""
    names = sorted({case for split in splits for case in split["val"]})
    order = np.arange(len(names))
    np.random.RandomState(SEED).shuffle(order)
    parts = [sorted(names[n] for n in part) for part in np.array_split(order, FOLDS)]
    return [{"train": sorted(set(names) - set(part)), "val": part} for part in parts]


def compare(by_subject: dict[str, Any], at_random: dict[str, Any], splits: Splits) -> dict[str, Any]:
    """Both ways and the table of their difference."""
    if by_subject["steps"] != at_random["steps"]:
        raise SystemExit("trainings of different lengths found, expected the same steps")
    siblings = {case for split in splits for case in split["val"] if has_sibling(case, split["train"])}
    table = []
    for key, words in KINDS.items():
        one, another = (merged(way["runs"], USUAL, key) for way in (by_subject, at_random))
        if one.keys() != another.keys():
            raise SystemExit(f"{len(one)} and {len(another)} cases judged, expected the same ones")
        parts = {
            "all": set(one),
            "sibling trained on at random": siblings,
            "no sibling trained on": one.keys() - siblings,
        }
        table += [{"copies": words, "cases": name, **row(one, another, part)} for name, part in parts.items()]
    return {
        "data_set": by_subject["data_set"],
        "steps": by_subject["steps"],
        "machine": by_subject["machine"],
        "date": date.today().isoformat(),
        "table": table,
        "runs": {"by subject": by_subject["runs"], "at random": at_random["runs"]},
    }


def has_sibling(case: str, others: Collection[str]) -> bool:
    """Whether a crop of the same person is among the others."""
    return any(other != case and person(other) == person(case) for other in others)


def person(case: str) -> int:
    """Numbers 2k - 1 and 2k are of one person."""
    found = re.search(r"(\d+)$", case)
    if found is None:
        raise SystemExit(f"{case}: a name without a number at its end found, expected one of the hippocampus data")
    return (int(found[1]) + 1) // 2


def row(one: Mapping[str, Any], another: Mapping[str, Any], cases: Collection[str]) -> dict[str, Any]:
    """Mean Dice of these cases in both ways, by label, and the difference by case."""
    labels = sorted({label for case in cases for label in one[case]})
    by_label = {
        words: {n: round(float(np.mean([v for c in cases if (v := way[c].get(n)) is not None])), 4) for n in labels}
        for words, way in (("by_subject", one), ("at_random", another))
    }
    found = medseg.summarise([mean(another[case]) - mean(one[case]) for case in sorted(cases)])
    return {
        "number": len(cases),
        **by_label,
        **{f"{words}_mean": round(float(np.mean(list(d.values()))), 4) for words, d in by_label.items()},
        "gained": {"mean": found.mean, "ci95": found.ci95},
    }


if __name__ == "__main__":
    main()
