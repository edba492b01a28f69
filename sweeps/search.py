"""Runs `cast-ray search` from a checkout that is not installed; it is what `ray job submit --working-dir .` starts.

python sweeps/search.py losses --preset shapes
python sweeps/search.py latency --trials 40
optuna-dashboard runs/losses-search-shapes-demo/study.journal     # pip install optuna-dashboard
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cast_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
