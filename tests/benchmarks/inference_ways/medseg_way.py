"""One measured process: medseg from Python, on a list of files; imports are timed apart.

Job: `images`, `model`, `out`, `options` (fields of `InferOptions`), `record`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages import Stages, read_job


def main() -> None:
    """Import, infer, say how long it took."""
    job = read_job()
    stages = Stages(Path(job["record"]))
    with stages.stage("import"):
        import torch

        import medseg

        run, options_class = medseg.infer, medseg.InferOptions
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in job["options"].items()}
    stages.facts["threads"] = torch.get_num_threads()
    with stages.stage("cases"):
        results = run(job["images"], [job["model"]], job["out"], options_class(**options))
    wrong = [f"{r.case}: {r.reason}" for r in results if r.status != "done"]
    if wrong:
        raise RuntimeError("; ".join(wrong))
    stages.facts["n"] = len(results)
    # stages of different cases may run side by side: their sum may be more than `cases`
    for result in results:
        for name, value in result.seconds.items():
            key = f"case.{name}"
            stages.seconds[key] = stages.seconds.get(key, 0.0) + value
    stages.write()


if __name__ == "__main__":
    main()
