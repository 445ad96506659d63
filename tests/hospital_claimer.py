"""A process that claims jobs, `python hospital_claimer.py URL NAME MOST`, and tells in a line of JSON which it got."""

from __future__ import annotations

import json
import sys

from medseg_pipelines.hospital.database import Database
from medseg_pipelines.hospital.jobs import Jobs, Worker


def main() -> None:
    """Says that it is ready, waits for a line, then claims until it has MOST jobs or nothing is left."""
    queue = Jobs(Database(sys.argv[1]), attempts=3, retry_s=10.0, lease_s=60.0)
    worker = Worker(sys.argv[2], sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    claimed: list[str] = []
    while len(claimed) < int(sys.argv[3]) and (job := queue.claim(worker)) is not None:
        claimed.append(job.id)
    print(json.dumps(claimed), flush=True)


if __name__ == "__main__":
    main()
