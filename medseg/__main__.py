"""`python -m medseg` is the command `medseg`."""

from medseg.cli import main

main()
