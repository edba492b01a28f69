"""Keeps `python -m cast_ray.datasets inspect` working, the former name of `cast-ray inspect`."""

import sys

from cast_ray.cli.main import run_renamed

if __name__ == "__main__":
    # `inspect` was its only command; its help was also asked for without it.
    arguments = sys.argv[2:] if sys.argv[1:2] == ["inspect"] else sys.argv[1:]
    sys.exit(run_renamed("python -m cast_ray.datasets inspect", "inspect", arguments))
