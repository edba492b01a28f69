"""Finds instances in one image with an exported student, by numpy, Pillow and onnxruntime alone.

python examples/exported_student.py student.onnx image.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
image = Image.open(sys.argv[2]).convert("RGB")
size = np.array([image.height, image.width])
scale = min(facts["image_px"] / size)  # the image is fitted into the model's size, its aspect is kept
inside = np.clip(np.round(size * scale).astype(int), 1, facts["image_px"])
pixels = np.zeros((1, 3, *facts["image_px"]), dtype=np.uint8)  # 0 below and right; normalised inside the model
resized = image.resize((inside[1], inside[0]), Image.Resampling.BILINEAR)
pixels[0, :, : inside[0], : inside[1]] = np.asarray(resized).transpose(2, 0, 1)
inputs = {"images": pixels, "inside_hw": inside, "image_hw": size}
boxes, labels, scores, masks = (output[0] for output in session.run(["boxes", "labels", "scores", "masks"], inputs))
for k in np.flatnonzero(scores >= facts["score_threshold"]):  # masks[k]: bool, at the size of the image itself
    print(facts["class_names"][labels[k]], f"{scores[k]:.3f}", boxes[k].round().astype(int), f"{masks[k].sum()} px")
