"""Registry rows: lazy, complete, helpful when misspelt."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from cast_ray.common.registry import ROWS, check_name, lookup


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


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("datasets", "os:getcwd", r"called as f\(config, progress\), found getcwd\(\)"),
        ("encoders", "json:dumps", r"called as f\(config, architecture\), found dumps\(obj"),
        ("decoders", "os:sep", r"called as f\(feature_dims, config\), found a str"),
        ("datasets", "os:nothing", "expected MODULE:NAME that Python can import"),
    ],
)
def test_code_that_cannot_be_called_as_it_must_be(kind, name, message):
    with pytest.raises(ValueError, match=f"'{name}': .*{message}") as error:
        lookup(kind, name)
    assert "\n" not in str(error.value)


def test_code_that_can_be_called_is_returned():
    import os

    assert lookup("decoders", "os:link") is os.link


def test_the_form_of_a_name():
    check_name("encoders", "vit")
    check_name("encoders", "no_such_module:vit")  # nothing is imported
    for name in ("vitt", "a b:c", ":", ""):
        with pytest.raises(ValueError, match=f"unknown name '{name}' in encoders.*MODULE:NAME"):
            check_name("encoders", name)


def test_looking_up_is_lazy():
    code = "import sys, cast_ray.common.registry as r; r.lookup('datasets', 'coco'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
