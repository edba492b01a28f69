"""Finds instances in one image with a saved student.

python examples/student.py runs/losses-shapes-demo/sup+semi+pxl image.png

The student may also be a folder that `cast-ray export` wrote.
"""

import sys

import torch

from cast_ray.data.reading.images import read_image
from cast_ray.data.views import fit_image
from cast_ray.runtime.store.models import open_student

if len(sys.argv) != 3:
    sys.exit(__doc__)
student, _ = open_student(sys.argv[1])  # a folder or a row of a run; Student.from_pretrained reads a folder alone
image = read_image(sys.argv[2])  # uint8 [height, width, 3], RGB, as stored: EXIF orientation is not applied
pixels, inside = fit_image(image, student.input_size)  # resized as in training, and padded
(instances,) = student.predict(torch.from_numpy(pixels)[None], [image.shape[:2]], [inside], min_score=0.3)
for instance in instances:  # each also has a mask, instance["rle"], at the size of the image itself
    print(f"{student.class_names[instance['label']]} {instance['score']:.2f}")
