"""Runs `cast-ray ablate` from a checkout that is not installed; it is what `ray job submit --working-dir .` starts.

python sweeps/ablate.py losses --preset shapes
python sweeps/ablate.py losses stages negatives labels --dry-run
python sweeps/ablate.py losses --preset coco --set data.root=DIR --scale smoke
python sweeps/ablate.py report runs/losses-shapes-demo     # as `cast-ray report`; also `store` and `efficiency`
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cast_ray.cli.main import main

OTHER_COMMANDS = ("report", "store", "efficiency")
"""First words that have always been commands of this file, not names of tables."""

if __name__ == "__main__":
    is_other = sys.argv[1:2] and sys.argv[1] in OTHER_COMMANDS
    sys.exit(main(sys.argv[1:] if is_other else ["ablate", *sys.argv[1:]]))
