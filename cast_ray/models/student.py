"""A trained segmenter as it is kept and used: weights, architecture, classes, colours and input size in one folder.

    student = Student.from_pretrained("folder")
    instances = student.predict(images)

The folder is laid out as transformers has it: `config.json`, `model.safetensors` and, for people, `README.md`. Loading
needs torch, transformers and safetensors, and neither Ray nor a dataset.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from httpx import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import ValidationError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn
from transformers.utils import cached_file

from cast_ray.common.files import check_replaceable, write_atomically
from cast_ray.common.version import VERSION
from cast_ray.contracts.instance import Instances
from cast_ray.contracts.records import Category, Predictions, class_names
from cast_ray.contracts.row_result import RowResult
from cast_ray.models.autocast import DTYPES, autocast
from cast_ray.models.card import HERE, model_card
from cast_ray.models.drawing import class_colours
from cast_ray.models.postprocess import predict_instances
from cast_ray.models.segmenter import Segmenter
from cast_ray.recipe import InputSize, ModelConfig, Precision
from cast_ray.recipe.licence_chain import LicenceChain, chain_of_plain_recipe

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
MODEL_TYPE = "cast_ray"


class Student(nn.Module):
    """A segmenter with its classes and the size of its input. A teacher that is a segmenter is kept the same way.

    Args:
        segmenter: trained.
        categories: C classes, in the order of its labels.
        image_px: height and width of the crops it was trained on, pixels.
        colours: C, of overlays; None: well separated ones.
        input_size: size at which it sees whole images; None: fitted into `image_px`.
        precision: that `predict` computes in: the one it was trained and measured in.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        categories: Sequence[Category],
        image_px: tuple[int, int],
        colours: Sequence[tuple[int, int, int]] | None = None,
        input_size: InputSize | None = None,
        precision: Precision = "off",
    ):
        super().__init__()
        self.precision: Precision = precision
        self.licences: LicenceChain | None = None
        """What it inherits from its teacher, encoder and data; None: not known. It is saved with the student."""
        self.card: str | None = None
        """The model card of the folder that it was loaded from, which it is saved with again; None: there was none."""
        assert segmenter.num_classes == len(categories)
        self.segmenter = segmenter
        self.categories = tuple(categories)
        self.image_px = (image_px[0], image_px[1])
        self.input_size = input_size or InputSize.of(self.image_px)
        self.colours = [(c[0], c[1], c[2]) for c in colours or class_colours(len(categories))]

    @property
    def class_names(self) -> list[str]:
        """C names, each once: see `records.class_names`."""
        return class_names(self.categories)

    @property
    def device(self) -> torch.device:
        return self.segmenter.pixel_mean.device

    def forward(self, images: torch.Tensor) -> Predictions:
        """Predicts like `Segmenter.forward`."""
        return self.segmenter(images)

    def predict(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]] | None = None,
        resized_hw: Sequence[tuple[int, int]] | None = None,
        max_detections: int = 100,
        min_score: float = 0.0,
    ) -> list[Instances]:
        """Instances of each image, as `predict_instances`; `cast_ray.data.views.fit_image` makes its inputs."""
        images = images.to(self.device)
        with autocast(self.precision, self.device):
            return predict_instances(self.segmenter, images, image_hw, resized_hw, max_detections, min_score)

    def config(self) -> dict[str, Any]:
        """What `config.json` holds, but for the licences."""
        encoder, names = self.segmenter.encoder, self.class_names
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["Student"],
            "cast_ray_version": VERSION,
            "model": self.segmenter.config.model_dump(mode="json"),
            "encoder_config": encoder.architecture,
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
            "id2label": {str(i): name for i, name in enumerate(names)},
            "colours": [list(c) for c in self.colours],
            "image_px": list(self.image_px),
            "input_size": self.input_size.part(),
            "precision": self.precision,
            "preprocessing": {
                "channels": "RGB",
                "resize": f"{self.input_size}, aspect kept, bilinear with antialias",
                "pad": "below and right, with 0" if self.input_size.is_fixed else "none",
                "rescale_factor": 1 / 255,
                "image_mean": list(encoder.mean),
                "image_std": list(encoder.std),
            },
        }

    def files(self, result: RowResult | None = None, place: str = HERE) -> dict[str, bytes]:
        """Name -> content of each file of the folder.

        Args:
            result: outcome of its row, for the model card and, where `licences` is None, for what it inherits.
            place: hub name that the folder is going to have, for the model card.
        """
        known = self.licences or (chain_of_plain_recipe(result.recipe) if result else None)
        licences = known.published() if known else None
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.segmenter.state_dict().items()}
        config = self.config() | ({"licences": licences.plain()} if licences else {})
        if result is None and self.card is not None:
            card = self.card.replace(HERE, place)
        else:
            num_parameters = sum(p.numel() for p in self.segmenter.parameters())
            card = model_card(config, num_parameters, result, licences, place)
        return {
            CONFIG: json.dumps(config, indent=1).encode(),
            WEIGHTS: save_tensors(tensors, metadata={"format": "pt"}),
            CARD: card.encode(),
        }

    def save_pretrained(self, folder: str | Path, result: RowResult | None = None) -> None:
        """Writes the folder.

        Args:
            folder: made where it is missing; a student that was saved there before is replaced.
            result: outcome of the row that made the student: its numbers go into the model card.

        Raises:
            ValueError: the folder holds something other than a saved student; see `check_free`.
        """
        check_free(folder)
        for name, content in self.files(result).items():
            write_atomically(Path(folder) / name, content)

    def push_to_hub(
        self,
        repo_id: str,
        result: RowResult | None = None,
        *,
        token: str | None = None,
        private: bool | None = None,
        api: HfApi | None = None,
    ) -> str:
        """Uploads the folder of `save_pretrained` to a model repository on the Hugging Face hub.

        Args:
            repo_id: `OWNER/NAME`; it is made where it is missing.
            result: as for `save_pretrained`.
            token: with write access; None: $HF_TOKEN or the one of `hf auth login`.
            private: whether a new repository is private; None: the owner's default.
            api: stands in for the hub; None: the hub itself.

        Returns:
            URL of the commit.

        Raises:
            ValueError: a name that no repository can have, no token, or the hub refuses; one line.
        """
        check_repo(repo_id)
        api = api or HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.files(result, repo_id).items():
                (Path(folder) / name).write_bytes(content)
            message = f"Upload a student of cast_ray {VERSION}"
            try:
                api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
                return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))
            except (OSError, HTTPError) as error:  # the hub's own errors are both, those of the network the latter
                raise ValueError(
                    f"hub repository {repo_id!r}: {_first_line(error)} (expected a token with write access in "
                    "$HF_TOKEN, or from `hf auth login`)"
                ) from None

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Student:
        """A saved student, in evaluation mode on the CPU.

        Args:
            source: a folder, or a model's name on the Hugging Face hub.

        Raises:
            ValueError: nothing there, not a student, or weights that do not fit; one line that names the file.
        """
        if not str(source).strip():  # not the current folder, which an empty path means elsewhere
            raise ValueError("the name of a saved student is empty: expected a folder or a name on the hub")
        try:
            config, weights = (_locate(str(source), name).read_bytes() for name in (CONFIG, WEIGHTS))
        except (OSError, ValueError) as error:
            raise ValueError(f"no saved student in {str(source)!r}: {_first_line(error)}") from None
        student = cls.from_files(config, weights, source=str(source))
        card = Path(source).expanduser() / CARD
        student.card = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
        return student

    @classmethod
    def from_files(cls, config: bytes, weights: bytes, source: str) -> Student:
        """Loads a student like `from_pretrained`, from the contents of the two files; `source` names them in errors."""
        spec = read_config(config, source)
        try:
            model = ModelConfig(**spec["model"])
            categories = [Category(**c) for c in spec["categories"]]
            with torch.random.fork_rng(devices=[]):  # random weights, overwritten below
                segmenter = Segmenter(model, len(categories), spec["encoder_config"])
            precision = spec.get("precision", "off")  # students of earlier versions were measured in float32
            if precision not in ("off", *DTYPES):
                raise ValueError(f"precision is {precision!r}: expected off, {' or '.join(DTYPES)}")
            size = InputSize.read(spec.get("input_size", spec))  # before, images were always fitted into image_px
            student = cls(segmenter, categories, spec["image_px"], spec["colours"], size, precision)
            if "licences" in spec:
                student.licences = LicenceChain.of_plain(spec["licences"])
        except (KeyError, TypeError, ValidationError, ValueError) as error:
            raise ValueError(f"{source}/{CONFIG}: cannot be read: {_first_line(error)}") from None
        try:
            segmenter.load_state_dict(load_tensors(weights))
        except Exception as error:  # safetensors raises its own, torch a RuntimeError of many lines
            lines = " ".join(str(error).split())
            raise ValueError(f"{source}/{WEIGHTS}: does not fit {CONFIG}: {lines[:300]}") from None
        return student.eval()


def check_free(folder: str | Path) -> None:
    """Checks that a student can be saved in a folder without overwriting the files of something else.

    Hidden files are not looked at: none is written, and the clone of an empty repository holds some.

    Raises:
        ValueError: the folder holds files and is not a saved student.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    check_replaceable(
        folder,
        [path.name for path in folder.iterdir() if not path.name.startswith(".")],
        lambda: bool(read_config((folder / CONFIG).read_bytes(), str(folder))),
        "a saved student",
        "an empty folder, a folder that is not there yet or an earlier export",
    )


def check_repo(repo_id: str) -> None:
    """Checks the form of a repository's name. Raises ValueError: it is not `OWNER/NAME`."""
    try:
        validate_repo_id(repo_id)
        is_valid = repo_id.count("/") == 1
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"hub repository {repo_id!r}: expected OWNER/NAME of letters, digits and . - _")


def read_config(config: bytes, source: str) -> dict[str, Any]:
    """The content of a `config.json`.

    Raises:
        ValueError: not JSON, or another kind of model's.
    """
    try:
        spec = json.loads(config)
    except ValueError as error:
        raise ValueError(f"{source}/{CONFIG}: not JSON: {error}") from None
    kind = spec.get("model_type") if isinstance(spec, dict) else None
    if kind != MODEL_TYPE:
        raise ValueError(
            f"{source}/{CONFIG}: model_type is {kind!r}: expected {MODEL_TYPE!r}, as Student.save_pretrained writes it"
        )
    return spec


def _locate(source: str, name: str) -> Path:
    """A file of a folder, or of a model on the hub, downloaded once."""
    path = Path(source).expanduser() / name
    if path.parent.is_dir():
        return path
    owner, _, model = source.partition("/")
    if not owner or not model or "/" in model or Path(owner).exists():  # asking the hub for a mistyped path takes long
        raise FileNotFoundError("no such folder")
    return Path(cached_file(source, name))


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
