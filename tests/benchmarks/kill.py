"""Kills `medseg infer` with signal 9 at random moments and goes on each time: are the masks those of a quiet run?

    MEDSEG_DATA=../shared/data python tests/benchmarks/kill.py --model runs/first -o tests/benchmarks/results/kill.json

Cases are copies of hippocampus images (under `MEDSEG_DATA`, or `--images` for any folder). Numbers of masks are drawn
from the first three quarters of the cases; each run is killed a random while after so many are there, and no sooner
than after one of its own: evenly from 0 to the seconds that a case takes. So kills hit reading, the network and writing
alike, whatever else the machine does; start-up is not killed. A mask counts as equal if all its bytes are. The exit
code is 1 where one is not, where a kill came too late, or where a temporary file is left.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from machine import machine

from medseg.readers import ENDINGS, split_ending
from medseg.versions import versions

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SECONDS_BETWEEN_LOOKS = 0.005


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="run folder")
    parser.add_argument("--images", type=Path, help="folder of images; left out: hippocampus/imagesTr")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    images = arguments.images or Path(os.environ.get("MEDSEG_DATA", DATA)) / "hippocampus" / "imagesTr"
    with tempfile.TemporaryDirectory() as work:
        scans = make_cases(images, Path(work) / "scans", arguments.cases)
        command = [sys.executable, "-m", "medseg", "infer", str(scans), "-m", str(arguments.model)]
        command += ["--device", arguments.device, "-o"]
        result = measure(command, Path(work), arguments)
    result |= {
        "machine": machine(),
        "system": platform.platform(),
        "versions": versions("medseg", "torch", "monai", "numpy"),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    hits = all(kill["hit"] for kill in result["kills"])
    return 0 if hits and result["equal"] == arguments.cases and not result["temporaries_left"] else 1


def make_cases(images: Path, folder: Path, count: int) -> Path:
    """`count` copies of the first images, again from the first where there are fewer."""
    found = sorted(f for f in images.iterdir() if split_ending(f.name)[1] in ENDINGS and not f.name.startswith("."))
    if not found:
        raise SystemExit(f"{images}: no image found; set MEDSEG_DATA or give --images")
    folder.mkdir()
    for n in range(count):
        source = found[n % len(found)]
        shutil.copy(source, folder / f"case{n:03}{split_ending(source.name)[1]}")
    return folder


def measure(command: list[str], work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The undisturbed run, the killed ones in one folder, and whether they end with the same masks."""
    quiet, killed = work / "quiet", work / "killed"
    span = undisturbed([*command, str(quiet)], quiet, arguments.cases)
    draw = random.Random(arguments.seed)
    targets = sorted(draw.sample(range(1, arguments.cases * 3 // 4 + 1), arguments.kills))
    kills = []
    for target in targets:
        delay = draw.uniform(0, span / arguments.cases)
        kills.append(kill_once([*command, str(killed)], killed, target, delay))
    left_by_last = hidden(killed)
    started = time.perf_counter()
    done = subprocess.run([*command, str(killed)], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    masks = [f for f in sorted(quiet.iterdir()) if f.suffix != ".json"]
    equal = [f.name for f in masks if (killed / f.name).is_file() and same(f, killed / f.name)]
    statuses = [c["status"] for c in json.loads((killed / "run.json").read_text())["cases"]]
    return {
        "cases": len(masks),
        "equal": len(equal),
        "different": sorted({f.name for f in masks} - set(equal)),
        "kills": kills,
        "temporaries_before_the_last_run": left_by_last,
        "temporaries_left": hidden(killed),
        "statuses": {s: statuses.count(s) for s in sorted(set(statuses))},
        "last_line": done.stdout.strip().splitlines()[-1].removeprefix(f"{killed}: "),
        "seconds": {"first_to_last_mask": round(span, 3), "last_run": round(seconds, 3)},
        "seed": arguments.seed,
    }


def undisturbed(command: list[str], folder: Path, cases: int) -> float:
    """Seconds from the first mask to the last."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    first = wait_for_new(process, folder, 0)
    wait_for_new(process, folder, cases - 1)
    last = time.perf_counter()
    if process.wait() != 0 or first is None:
        raise SystemExit(f"the undisturbed run ended with exit code {process.returncode}")
    return last - first


def kill_once(command: list[str], folder: Path, target: int, delay: float) -> dict[str, object]:
    """Let the run come to `target` masks, wait, kill it; what it leaves."""
    before = finished(folder)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    began = wait_for_new(process, folder, max(before, target - 1))
    time.sleep(delay)
    process.kill()
    code = process.wait()
    return {
        "at_masks": target,
        "seconds_later": round(delay, 4),
        "exit_code": code,
        "hit": began is not None and code < 0,
        "masks_before": before,
        "masks_after": finished(folder),
        "temporaries": len(hidden(folder)),
    }


def wait_for_new(process: subprocess.Popen[bytes], folder: Path, known: int) -> float | None:
    """When there were more than `known` masks; None where the process ended before."""
    while process.poll() is None:
        if finished(folder) > known:
            return time.perf_counter()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return time.perf_counter() if finished(folder) > known else None


def finished(folder: Path) -> int:
    """Number of masks."""
    if not folder.is_dir():
        return 0
    return sum(not f.name.startswith(".") and f.suffix != ".json" for f in folder.iterdir())


def hidden(folder: Path) -> list[str]:
    """Names of hidden files."""
    return sorted(f.name for f in folder.iterdir() if f.name.startswith("."))


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    return one.read_bytes() == other.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
