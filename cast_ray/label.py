"""Labels images with a teacher: instances of the classes asked for, as one COCO JSON.

python -m cast_ray.label PHOTOS --teacher grounded_sam --classes "person, traffic light" --out LABELS
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from pycocotools import mask as coco_mask
from rich.console import Console

import cast_ray
from cast_ray.common.files import replaced
from cast_ray.common.paths import is_uri
from cast_ray.common.registry import lookup
from cast_ray.console import Parser, exit_code, output_folder, plain_console, positive, share, whole_number
from cast_ray.contracts.records import Category, mask_areas
from cast_ray.data.reading.class_lists import read_classes
from cast_ray.data.reading.photos import OVERLAYS
from cast_ray.engine.world import pick_device
from cast_ray.models.autocast import fastest_precision
from cast_ray.predict import (
    EXIT_NOTHING,
    INTERRUPTED,
    JsonList,
    Predictor,
    Rows,
    in_batches,
    list_photos,
    run_images,
)
from cast_ray.recipe import InputSize, PseudoConfig, Recipe, build_recipe, parse_overrides
from cast_ray.recipe.teachers import KINDS
from cast_ray.runtime.store.models import open_teacher
from cast_ray.teachers.checkpoints import find_checkpoint
from cast_ray.teachers.protocol import Teacher
from cast_ray.teachers.pseudo_labels import pseudo_labels
from cast_ray.teachers.voting import predict_by_vote
from cast_ray.unfinished import weights_digest

PUBLISHED = KINDS[1:]
"""Kinds of teachers that label without any training."""


class Labeller(Predictor):
    """A teacher with its settings: image files in, rows of pseudo-labels out.

    Args:
        teacher: on its device.
        pseudo: which of its instances are trusted, and how they are painted.
        amp, overlays: see `Predictor`.
    """

    def __init__(self, teacher: Teacher, pseudo: PseudoConfig, *, amp: str, overlays: bool):
        limit = teacher.config.inference.max_detections
        super().__init__(teacher, threshold=pseudo.score_threshold, max_detections=limit, amp=amp, overlays=overlays)
        self.teacher, self.pseudo = teacher, pseudo

    def ask(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[list[dict[str, Any]]]:
        return predict_by_vote(self.teacher, images, image_hw, resized_hw, self.pseudo)

    def choose(self, instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return pseudo_labels(instances, self.pseudo)


def make_labeller(
    recipe: Recipe, source: str, categories: Sequence[Category] | None, device: str, amp: str, overlays: bool
) -> Labeller:
    """A labeller in whichever process calls it; see `load`."""
    torch.set_num_threads(1)
    teacher = load(recipe, source, categories).to(pick_device(device))
    if amp == "auto" and source in PUBLISHED:
        amp = fastest_precision(teacher.device)
    return Labeller(teacher, recipe.pseudo, amp=amp, overlays=overlays)


def load(recipe: Recipe, source: str, categories: Sequence[Category] | None) -> Teacher:
    """The teacher on the CPU.

    Args:
        recipe: its `teacher` part says how a kind is made and how any teacher is read out.
        source: a kind (its checkpoints are the recipe's), or a saved teacher as of `open_teacher`.
        categories: to look for; None: those of a saved teacher.

    Raises:
        ValueError: a checkpoint or teacher that is not there or does not know the classes.
    """
    config = recipe.teacher
    if source in PUBLISHED:
        assert categories is not None
        folders = {field: find_checkpoint(name, field) for field, name in config.checkpoint_fields().items()}
        kind: type[Teacher] = lookup("teachers", source)
        return kind.load(folders, config, categories, recipe.input_size(by_teacher=True)).eval()
    part: dict[str, Any] = {"inference": config.inference.model_dump()}
    if config.prompt.synonyms:
        part["prompt"] = config.prompt.model_dump()
    size = None if config.image_px is None else InputSize.of(config.image_px)
    try:
        with open_teacher(source, part, size, categories) as teacher:
            return teacher
    except ValueError as error:
        if is_uri(source) or Path(source).expanduser().exists():
            raise
        kinds = ", ".join(PUBLISHED)
        raise ValueError(f"--teacher: neither a kind ({kinds}) nor a saved teacher: {error}") from None


def write_labels(rows: Rows, folder: str, categories: Sequence[Category], out: Path, counts: Counter[int]) -> None:
    """Writes `instances.json`, a COCO file with scores, which appears when it is whole.

    Args:
        rows: of all images; they are gone through twice.
        folder: that images are named relative to, which is then `data.root`; empty: by their whole paths.
        categories: of the labels.
        out: the output folder.
        counts: filled with the number of labels of each category id.
    """
    classes = json.dumps([{"id": c.id, "name": c.name} for c in categories])
    with replaced(out / "instances.json") as partial_file, partial_file.open("w") as file:
        file.write(f'{{"categories": {classes}, ')
        with JsonList(file, '"annotations": [', "],") as annotations:
            for number, row in rows():
                for result in json.loads(row["results"]):
                    rle = result["segmentation"]
                    # Unlike results (see `coco_result`), annotations have boxes: their size goes by their own `area`.
                    facts = {"bbox": coco_mask.toBbox(rle).tolist(), "area": int(mask_areas([rle])[0]), "iscrowd": 0}
                    annotations.add({"id": annotations.num + 1, "image_id": number, **result, **facts})
                    counts[result["category_id"]] += 1
        with JsonList(file, '"images": [', "]}") as images:
            for number, row in rows():
                name = row["path"][len(folder) :].lstrip("/") if folder else row["path"]
                images.add({"id": number, "file_name": name, "height": row["height"], "width": row["width"]})


def _shared_folder(paths: Sequence[str]) -> str:
    """The folder of local paths or URIs that holds them all; empty where there is none."""
    parts = [path.split("/")[:-1] for path in paths]
    same = takewhile(lambda level: len(set(level)) == 1, zip(*parts))
    return "/".join(level[0] for level in same)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _run(arguments, plain_console(stderr=True)), INTERRUPTED)


def _run(arguments: argparse.Namespace, errors: Console) -> int:
    recipe = _recipe(arguments)
    out = output_folder(arguments.out)
    paths = list_photos(arguments.images, errors, exclude=[str(out / OVERLAYS)])
    categories = read_classes(arguments.classes) if arguments.classes else None
    if categories is None and arguments.teacher in PUBLISHED:
        raise ValueError(f"--teacher {arguments.teacher} can look for anything: name what by --classes")
    make = partial(
        make_labeller,
        recipe,
        arguments.teacher,
        categories,
        arguments.device,
        arguments.amp,
        not arguments.no_overlays,
    )
    labeller = make()  # here too with --workers: what is wrong with a teacher shows before Ray starts
    teacher = labeller.teacher
    settings = {
        "version": cast_ray.__version__,
        "threshold": arguments.threshold,
        "classes": teacher.class_names,
        "category ids": [category.id for category in teacher.categories],
        "teacher": arguments.teacher,
        "teacher settings": teacher.config.settings(),
        "input size": teacher.input_size.part(),
        "weights": weights_digest(teacher),
        **{f"pseudo.{name}": value for name, value in recipe.pseudo.model_dump().items()},
        "precision": teacher.precision,
        "overlays": not arguments.no_overlays,
    }

    def rows_of(missing: list[str]) -> Iterator[dict[str, Any]]:
        if arguments.workers:
            from cast_ray.runtime.worker.prediction import map_files

            return map_files(
                make, missing, batch=arguments.batch, num_workers=arguments.workers, address=arguments.address
            )
        return in_batches(labeller, missing, arguments.batch)

    counts = Counter[int]()
    write = partial(write_labels, folder=_shared_folder(paths), categories=teacher.categories, out=out, counts=counts)
    done = run_images(paths, settings, rows_of, write, out, errors)
    named = zip(teacher.class_names, teacher.categories)
    found = ", ".join(f"{name} {counts[c.id]}" for name, c in named if counts[c.id])
    print(f"{done} of {len(paths)} images, {counts.total()} labels ({found or 'none'}): {out / 'instances.json'}")
    if done and not counts:
        errors.print(
            f"nothing found in any image: asked for {', '.join(teacher.class_names[:12])} above --threshold "
            f"{arguments.threshold}. Lower it, or name other words by --set teacher.prompt.synonyms",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return 0 if counts else EXIT_NOTHING


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """The teacher and pseudo parts that the user asked for."""
    threshold = {key: arguments.threshold for key in ("pseudo.score_threshold", "teacher.inference.score_threshold")}
    overrides = parse_overrides(arguments.set)
    for key in overrides:
        if not key.startswith(("teacher.", "pseudo.")):
            raise ValueError(f"--set {key}: expected a key of `teacher` or `pseudo`")
    if overrides.get("pseudo.class_thresholds", "fixed") != "fixed":
        raise ValueError("--set pseudo.class_thresholds: balanced thresholds need labelled images; expected fixed")
    kind = {"teacher.kind": arguments.teacher} if arguments.teacher in PUBLISHED else {}
    return build_recipe("coco", "full", overrides={**threshold, **overrides, **kind, "stages.use_adapt": False})


def _parser() -> Parser:
    parser = Parser(
        prog="python -m cast_ray.label",
        description="Labels images with a teacher. Writes instances.json (COCO, with scores) and overlays/*.png.",
    )
    parser.add_argument("images", nargs="+", help="files, folders, quoted patterns, local or s3://...")
    parser.add_argument(
        "--teacher",
        required=True,
        help=f"{', '.join(PUBLISHED)}: published weights; or a saved one: a folder, a URI, a row runs/<name>/<row>",
    )
    parser.add_argument(
        "--classes",
        help="names with commas between them, or a file: a .txt of one name a line, a JSON list of names (.json) or "
        "a COCO .json",
    )
    parser.add_argument("--out", required=True, help="folder, made where missing")
    parser.add_argument("--threshold", type=share, default=0.3, help="least score (default: %(default)s)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a recipe key of `teacher` or `pseudo`, for example teacher.grounded_sam.detector=DIR",
    )
    parser.add_argument("--batch", type=positive, default=8, help="images at a time (default: %(default)s)")
    parser.add_argument(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        default="auto",
        help="precision; auto: that of a saved teacher's training, and for published weights the fastest of the device "
        "(default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--no-overlays", action="store_true", help="labels only")
    parser.add_argument(
        "--workers", type=whole_number, default=0, help="processes of a Ray cluster (default: 0, this process)"
    )
    parser.add_argument("--address", help="Ray cluster of --workers (default: $RAY_ADDRESS, else a local one)")
    return parser


if __name__ == "__main__":
    from cast_ray.label import main as main_by_name  # so that Ray's workers find `make_labeller` by its name

    sys.exit(main_by_name())
