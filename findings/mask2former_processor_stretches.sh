#!/usr/bin/env bash
# transformers 4.49.0: the image processor of Mask2Former STRETCHES images to multiples of `size_divisor`, it does not pad.
#
# One would guess: an image of 48 x 80 with shortest_edge 800 and longest_edge 1333 is resized to 800 x 1333 (aspect kept)
# and then padded to 800 x 1344, as detectron2's Mask2Former does and as the name "size divisor" says there. Masks at the
# network's size would then have to be cut before they are resized to the image.
# What happens: the image is resized to 800 x 1344, width and height by different factors, and nothing is padded. Cutting
# the masks to 1333 columns shifts every object; features are of an image that is up to 31 pixels wider than its aspect.
#
# Seen (transformers 4.49.0, numpy 1.26.4, pillow 11.1.0):
#   output 800 x 1344, factors 16.667 and 16.800, columns of padding: 0
#   without size_divisor: 800 x 1333
# Exits 0 while this is so, 1 when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==4.49.0" "numpy==1.26.4" "pillow==11.1.0"
cat > "$folder/check.py" <<'PY'
import sys

import numpy as np
from transformers import Mask2FormerImageProcessor

image = np.full((48, 80, 3), 255, dtype=np.uint8)  # white: padding, which is 0, would be seen


def processed(**options):
    size = {"shortest_edge": 800, "longest_edge": 1333}
    processor = Mask2FormerImageProcessor(size=size, do_normalize=False, do_rescale=False, **options)
    return np.asarray(processor(images=[image], return_tensors="np")["pixel_values"])[0]


found, plain = processed(size_divisor=32), processed(size_divisor=0)
height, width = found.shape[-2:]
padding = int((found.max((0, 1)) == 0).sum())
print(f"output {height} x {width}, factors {height / 48:.3f} and {width / 80:.3f}, columns of padding: {padding}")
print(f"without size_divisor: {plain.shape[-2]} x {plain.shape[-1]}")
sys.exit(0 if (height, width, padding) == (800, 1344, 0) and plain.shape[-2:] == (800, 1333) else 1)
PY
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
