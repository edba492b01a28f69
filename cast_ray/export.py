"""Keeps `python -m cast_ray.export` working, the former name of `cast-ray export`."""

import sys

from cast_ray.cli.main import run_renamed

if __name__ == "__main__":
    sys.exit(run_renamed("python -m cast_ray.export", "export"))
