"""Keeps `python -m cast_ray.label` working, the former name of `cast-ray label`."""

import sys

from cast_ray.cli.main import run_renamed

if __name__ == "__main__":
    sys.exit(run_renamed("python -m cast_ray.label", "label"))
