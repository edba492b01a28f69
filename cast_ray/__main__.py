"""Makes `python -m cast_ray` the same as `cast-ray`."""

import sys

from cast_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
