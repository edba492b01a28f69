"""Registry rows: lazy, complete, helpful when misspelt."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from cast_ray.common.registry import ROWS, lookup


def test_datasets_are_found():
    from cast_ray.data.formats import coco, shapes

    assert lookup("datasets", "coco") is coco.index and lookup("datasets", "shapes") is shapes.index


def test_every_row_names_something_that_exists():
    for kind, rows in ROWS.items():
        for name, target in rows.items():
            assert find_spec(target.partition(":")[0]) is not None, target
            assert callable(lookup(kind, name))


def test_misspelt_names():
    with pytest.raises(ValueError, match="unknown name 'shape' in datasets: did you mean 'shapes'"):
        lookup("datasets", "shape")
    with pytest.raises(ValueError, match="unknown name 'zzz' in datasets: expected one of shapes, coco"):
        lookup("datasets", "zzz")
    with pytest.raises(ValueError, match="unknown kind 'dataset': did you mean 'datasets'"):
        lookup("dataset", "coco")


def test_looking_up_is_lazy():
    code = "import sys, cast_ray.common.registry as r; r.lookup('datasets', 'coco'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
