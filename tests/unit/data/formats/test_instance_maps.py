"""Label maps to RLE: equal to one dense mask per value."""

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from cast_ray.data.formats.instance_maps import encode_regions


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_equals_a_mask_for_each_value(seed, dtype):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    values = (
        rng.choice([0, 1, 7, 200], (height, width))
        if seed % 2
        else np.repeat(rng.choice([3, 9, 255], (height, 1)), width, axis=1)
    )
    regions = encode_regions(values.astype(dtype))
    assert list(regions) == sorted(set(values.ravel().tolist()))
    for value, rle in regions.items():
        mask = np.asfortranarray(values == value, dtype=np.uint8)
        assert rle == mask_utils.encode(mask)["counts"]
