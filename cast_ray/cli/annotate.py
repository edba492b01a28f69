"""`cast-ray annotate` takes labels to an annotation tool with masks drawn, and brings a person's corrections back.

cast-ray annotate export LABELS --to cvat --out TO_CVAT
cast-ray annotate import EXPORT.zip --against TO_CVAT --out CORRECTED
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from rich.console import Console

from cast_ray.cli.options import EXIT_FAILED, Parser, exit_code, output_folder, plain_console

TOOLS = ("coco", "cvat", "label-studio", "yolo")
_NEXT = {
    "coco": "{out}/instances.json and {out}/images are a COCO dataset, which most tools import",
    "cvat": "In CVAT: a new project whose labels are those of {out}/cvat_labels.json (tab Raw); Actions, Import "
    "dataset, COCO 1.0, {out}/cvat.zip. Afterwards: Export dataset, COCO 1.0",
    "label-studio": "In Label Studio: a new project with the labelling interface {out}/label_config.xml (Code); serve "
    "the photos as --image-url says; import {out}/tasks.json. Afterwards: Export, JSON",
    "yolo": "{out}/data.yaml names the classes; images and text files of polygons lie beside it",
}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    run = {"export": _export, "import": _import}[arguments.command]
    return exit_code(lambda: run(arguments, plain_console(stderr=True)))


def _export(arguments: argparse.Namespace, errors: Console) -> int:
    from cast_ray.annotation.exporting import choose, export, list_labels, read_labels
    from cast_ray.data.reading.class_lists import read_classes

    out = output_folder(arguments.out)
    if arguments.classes:
        labels = list_labels(arguments.labels, read_classes(arguments.classes))
    else:
        labels = read_labels(arguments.labels, arguments.photos or "")
    if arguments.images:
        labels = choose(labels, arguments.images)
    exported, lost = export(
        labels,
        arguments.to,
        arguments.shapes,
        out,
        copies_images=not arguments.no_photos,
        url_prefix=arguments.image_url,
    )
    num_objects = sum(len(image.objects) for image in exported.images)
    print(f"{len(exported.images)} images with {num_objects} objects for {arguments.to}: {out}")
    if lost:
        print(
            f"as polygons: {lost.num_inexact} of {lost.num_objects} objects are not exactly their mask "
            f"(IoU {lost.mean_iou:.3f} on average, at least {lost.least_iou:.3f})"
        )
    print(_NEXT[arguments.to].format(out=out))
    print(f"Then: cast-ray annotate import EXPORT --against {shlex.quote(str(out))} --out FOLDER")
    return 0


def _import(arguments: argparse.Namespace, errors: Console) -> int:
    from cast_ray.annotation.exported import read_exported
    from cast_ray.annotation.importing import AGAIN, REPORT, import_returned, new_class_words, read_returned

    def warn(text: str) -> None:
        errors.print(text, style="yellow", highlight=False, soft_wrap=True)

    out = output_folder(arguments.out)
    exported = read_exported(arguments.against)
    returned = read_returned(arguments.export, exported)
    done = import_returned(exported, returned, arguments.photos or "", out, skip_bad=arguments.skip_bad)
    for line in done.summary():
        print(line)
    for fault in done.faults:
        warn(f"left out: {fault}")
    for line in new_class_words(exported, done):
        warn(line)
    if (out / AGAIN).exists():
        warn(f"{out / AGAIN} lists the images that were not imported, for annotate export --images")
    print(f"Written: {out}; what changed in each image: {out / REPORT}")
    root, photos = shlex.quote(str(out.absolute())), shlex.quote(arguments.photos or exported.photos or "PHOTOS")
    print(
        f"Train on it: cast-ray ablate main --preset coco --set data.root={root} --set data.label_fraction=1 "
        f"--set data.unlabelled_pool=extra --set data.extra_image_dir={photos}"
    )
    return 0 if done.images else EXIT_FAILED


def _parser() -> Parser:
    parser = Parser(
        prog="cast-ray annotate",
        description="Takes labels to an annotation tool with masks drawn, and brings a person's corrections back as "
        "labelled data.",
    )
    commands = parser.add_commands()
    export = commands.add_parser(
        "export",
        help="write what a tool imports",
        description="Writes images with pre-drawn masks in the form that an annotation tool imports, and "
        "exported.json, which `annotate import` compares with what comes back.",
    )
    export.add_argument(
        "labels",
        metavar="LABELS",
        help="output folder of `cast-ray label` or `cast-ray predict`, or a COCO file; with --classes a folder of "
        "photos without labels",
    )
    export.add_argument("--to", required=True, choices=TOOLS, help="the tool, or the form that it imports")
    export.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the tool's files")
    export.add_argument("--images", metavar="FILE", help="text file of image names, one a line (default: all images)")
    export.add_argument("--classes", help="for photos without labels: names with commas between them, or a file")
    export.add_argument(
        "--shapes",
        choices=("masks", "polygons"),
        help="masks lose nothing and are edited with a brush; polygons are simplified, and what they lose is told "
        "(default: masks, except for yolo)",
    )
    export.add_argument(
        "--image-url",
        default="/data/local-files/?d=",
        metavar="PREFIX",
        help="label-studio: what stands before the name of a photo (default: %(default)s, the files below "
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT)",
    )
    export.add_argument("--no-photos", action="store_true", help="do not copy the photos: the tool has them already")
    bring = commands.add_parser(
        "import",
        help="read a tool's export back as labelled data",
        description="Reads what a tool exported (COCO, CVAT's COCO 1.0, Label Studio's JSON, YOLO; a zip file, a "
        "folder or a .json file), counts what a person changed, and writes a COCO dataset with the photos.",
    )
    bring.add_argument("export", metavar="EXPORT", help="zip file, folder or .json file of the tool")
    bring.add_argument("--against", required=True, metavar="EXPORTED", help="the --out folder of `annotate export`")
    bring.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the dataset")
    bring.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out images with something that cannot be used, and list them (default: stop and write nothing)",
    )
    for command in (export, bring):
        command.add_argument("--photos", metavar="FOLDER", help="folder of the photos, if it is not the recorded one")
    return parser
