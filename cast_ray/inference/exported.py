"""An exported file, run by the runtime that it is made for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from cast_ray.contracts.instance import Instance, Instances
from cast_ray.models.export import INPUTS, OUTPUTS
from cast_ray.models.export_openvino import RT_INFO

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


class ExportedStudent:
    """A student that was exported; it finds instances as `Student.predict` does.

    Args:
        path: FILE.onnx or FILE.xml.
        device: that it runs on; a runtime that knows no GPU takes the CPU, see `device`.

    Raises:
        ValueError: no such file, another kind of file, or a runtime that is not installed.
    """

    def __init__(self, path: str | Path, device: torch.device = torch.device("cpu")):  # noqa: B008
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: expected an exported student, found no file")
        read = {".onnx": _read_onnx, ".xml": _read_openvino}.get(path.suffix.lower())
        if read is None:
            raise ValueError(f"{path}: expected FILE.onnx or FILE.xml")
        self.run: Run
        self.run, plain, self.runtime, self.device = read(path, device)
        try:
            self.facts: dict[str, Any] = {name: json.loads(value) for name, value in plain.items()}
            self.image_px: tuple[int, int] = (self.facts["image_px"][0], self.facts["image_px"][1])
        except (ValueError, KeyError):
            raise ValueError(f"{path}: expected a file that `cast-ray export` wrote, found other metadata") from None

    def predict(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int = 100,
        min_score: float = 0.0,
    ) -> list[Instances]:
        """Instances of each image, as `Student.predict`; images go through the model one at a time."""
        found = []
        for pixels, size, inside in zip(images.numpy(), image_hw, resized_hw):
            given = dict(zip(INPUTS, (pixels[None], np.array(inside), np.array(size))))
            _, labels, scores, masks = (output[0] for output in self.run(given))
            kept = [k for k in range(min(len(scores), max_detections)) if masks[k].any() and scores[k] >= min_score]
            rles = coco_mask.encode(np.asfortranarray(masks[kept].transpose(1, 2, 0).astype(np.uint8)))
            instances: Instances = []
            for k, rle in zip(kept, rles):
                facts = (int(labels[k]), float(scores[k]), rle["counts"], list(rle["size"]))
                instances.append(Instance(label=facts[0], score=facts[1], rle=facts[2], size=facts[3]))
            found.append(instances)
        return found


def _read_onnx(path: Path, device: torch.device) -> tuple[Run, dict[str, str], str, torch.device]:
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("onnxruntime is not installed: pip install 'cast_ray[export]'") from None
    on_gpu = device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    providers = [*(["CUDAExecutionProvider"] if on_gpu else []), "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(path), providers=providers)
    used = session.get_providers()[0]  # one that fails to start gives way to the next
    runtime = f"onnxruntime {onnxruntime.__version__} ({used.removesuffix('ExecutionProvider')})"
    facts = session.get_modelmeta().custom_metadata_map
    device = device if used.startswith("CUDA") else torch.device("cpu")
    return lambda inputs: session.run(list(OUTPUTS), inputs), facts, runtime, device


def _read_openvino(path: Path, device: torch.device) -> tuple[Run, dict[str, str], str, torch.device]:
    try:
        import openvino
    except ImportError:
        raise ValueError("openvino is not installed: pip install 'cast_ray[openvino]'") from None
    model = openvino.Core().read_model(str(path))
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    facts = model.get_rt_info(RT_INFO).value if model.has_rt_info(RT_INFO) else {}
    plain = {name: value.value if hasattr(value, "value") else value for name, value in facts.items()}

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = compiled(inputs)
        return [results[name] for name in OUTPUTS]

    return run, plain, f"openvino {openvino.__version__.split('-')[0]} (CPU)", torch.device("cpu")
