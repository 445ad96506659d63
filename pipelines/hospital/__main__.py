"""`python -m medseg_pipelines.hospital` is `medseg-hospital`."""

from medseg_pipelines.hospital.command import main

if __name__ == "__main__":
    main()
