"""Keeps `python -m cast_ray.predict` working, the former name of `cast-ray predict`."""

import sys

from cast_ray.cli.main import run_renamed

if __name__ == "__main__":
    sys.exit(run_renamed("python -m cast_ray.predict", "predict"))
