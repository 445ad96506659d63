"""The door of `medseg-hospital`: what the node needs beyond medseg may not be installed."""

import sys

from rich.markup import escape

import medseg
from medseg.cli.shared import USAGE
from medseg.optional import require
from medseg.terminal import err


def main() -> None:
    """Run the command line and exit with the code that the outcome deserves."""
    try:
        command = require("medseg_pipelines.hospital.command", "hospital")
    except medseg.ConfigError as error:
        err.print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(USAGE)
    command.main()


if __name__ == "__main__":
    main()
