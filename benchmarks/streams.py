"""Images/s of the training stream and of the labelling job, each beside the loops that it replaces.

    python benchmarks/streams.py                                   # crops of 512x1024 from JPEG of twice the size
    python benchmarks/streams.py --format png                      # the same from PNG, as Cityscapes' are
    python benchmarks/streams.py --native --cpu                    # CPU time alone: a machine that others use too
    python benchmarks/streams.py --image-px 256 256 --steps 200    # crops of 256x256

Draws scenes with instances into a temporary folder, then runs, in turn and several times, on the same plan:

- loop: read, decode, views, collate and tensors, one step after the other in one process;
- loader: torch's DataLoader with --num-workers processes over the same steps;
- ours: `training_stream`, with as many decoding tasks;

Both rivals read whole images with Pillow, `Image.open(path).convert("RGB")`, as a dataset class usually does;

and for labelling, on a teacher of the preset `coco`:

- inference: the teacher and the thresholds alone, on images that are already decoded and in memory;
- ours: the labelling job with one actor, from the image files to Parquet, after its start.

The consumer of a training stream does nothing with its batches, so the numbers are what a stream can deliver. Rates are
taken from the first batch on; what came before it is printed as start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cast_ray.contracts.records import RECORD_SCHEMA, Category, ClassMap, encode_image_id
from cast_ray.data.batches import collate, join, to_batch
from cast_ray.data.formats.segmentations import encode_mask
from cast_ray.data.reading.images import read_image
from cast_ray.data.sampling import view_seed, worker_slots
from cast_ray.data.views import fit_image, make_sample
from cast_ray.models.segmenter import build_segmenter
from cast_ray.plan.graph import Stage
from cast_ray.recipe import DataConfig, PseudoConfig, RuntimeConfig, build_recipe
from cast_ray.recipe.labels import FIXED_SIZE_BATCH
from cast_ray.runtime.cluster import connect
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.pictures import Pictures
from cast_ray.runtime.data.resources import configure_data, stream_bundle
from cast_ray.runtime.data.training_stream import SampleRules, StepShare, training_stream
from cast_ray.runtime.placement import reserve
from cast_ray.runtime.process_settings import prepare_process
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import save_model
from cast_ray.runtime.worker.label_job import LabelJob
from cast_ray.runtime.worker.labeller import PseudoLabeller
from cast_ray.runtime.worker.labelling import label_images

CATEGORIES = tuple(Category(i + 1, name) for i, name in enumerate(("disc", "square", "cross", "ring")))
SCORE = 0.9


def draw_scene(height: int, width: int, num_instances: int, seed: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A smooth background with grain and discs on it; uint8 [h, w, 3] and instances as in RECORD_SCHEMA."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    rows, columns = np.ogrid[:height, :width]
    instances = []
    for _ in range(num_instances):
        y, x, a, b = rng.uniform(0, [height, width, height / 6, height / 6])
        mask = ((rows - y) / (a + 8)) ** 2 + ((columns - x) / (b + 8)) ** 2 < 1
        pixels[mask] = rng.integers(0, 256, 3)
        category = int(rng.integers(len(CATEGORIES))) + 1
        instances.append({"category_id": category, "rle": encode_mask(mask), "score": SCORE, "is_crowd": False})
    pixels += rng.integers(-6, 7, pixels.shape, dtype=np.int16)
    return pixels.clip(0, 255).astype(np.uint8), instances


def draw_images(
    folder: Path, num_images: int, height: int, width: int, num_instances: int, suffix: str = "jpg"
) -> pa.Table:
    """Records of drawn image files."""
    rows = []
    for i in range(num_images):
        pixels, instances = draw_scene(height, width, num_instances, i)
        path = folder / f"{i:05d}.{suffix}"
        Image.fromarray(pixels).save(path, quality=90)
        rows.append(
            {
                "image_id": encode_image_id(i),
                "uri": str(path),
                "height": height,
                "width": width,
                "instances": instances,
            }
        )
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


class Steps(Dataset):
    """The plan's steps for the rivals: item i is step i of a whole batch, collated; half of it labelled."""

    def __init__(self, table: pa.Table, data: DataConfig, batch: int, steps: int):
        self.table, self.data, self.share, self.steps = table, data, batch // 2, steps
        half = table.num_rows // 2
        slots = [worker_slots(half, self.share, 0, steps, 0, 0, 1) for _ in range(2)]
        self.plan = np.concatenate([slots[0], slots[1] + half], axis=1)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        classes = ClassMap(CATEGORIES)
        samples = []
        for slot, index in enumerate(self.plan[step]):
            row = self.table.slice(int(index), 1).to_pylist()[0]
            known = slot < self.share
            seed = view_seed(0, step, slot)
            image = np.array(Image.open(row["uri"]).convert("RGB"))
            samples.append(make_sample(image, row, classes, self.data, seed, use_instances=True, truth=known))
        return join(collate(samples, self.share))


def run_loop(steps: Steps) -> Iterator[Any]:
    for step in range(len(steps)):
        yield to_batch(steps[step])


def run_loader(steps: Steps, num_workers: int) -> Iterator[Any]:
    loader = DataLoader(steps, batch_size=None, num_workers=num_workers, worker_init_fn=lambda _: prepare_process())
    for arrays in loader:
        yield to_batch({name: tensor.numpy() for name, tensor in arrays.items()})


def run_stream(steps: Steps, records: ray.ObjectRef, runtime: RuntimeConfig) -> Iterator[Any]:
    half = steps.table.num_rows // 2
    labels = ray.put(steps.table.slice(half, half).combine_chunks())  # of the other half, its ground truth
    images = Images(records, np.arange(half), np.arange(half, 2 * half), CATEGORIES, labels)
    with reserve([stream_bundle(runtime)]) as group:
        configure_data(group, runtime, 0)
        yield from training_stream(
            images,
            steps.data,
            runtime,
            StepShare(steps.share, steps.share, len(steps), seed=0),
            SampleRules(strong=True),
        )


def run_here(steps: Steps) -> Iterator[Any]:
    """The stream without Ray: the process that holds the records makes its batches itself."""
    half = steps.table.num_rows // 2
    labels = steps.table.slice(half, half).combine_chunks()
    images = Images(steps.table, np.arange(half), np.arange(half, 2 * half), CATEGORIES, labels)
    share = StepShare(steps.share, steps.share, len(steps), seed=0)
    yield from training_stream(images, steps.data, RuntimeConfig(), share, SampleRules(strong=True))


def measure(batches: Iterator[Any], skip: int) -> tuple[float, float, float]:
    """Images/s after the first `skip` batches, seconds to the first, and this process's CPU milliseconds an image."""
    began = time.monotonic()
    first = start = 0.0
    images = cpu = 0.0
    for i, batch in enumerate(batches):
        if i == 0:
            first = time.monotonic() - began
        if i == skip:
            start, cpu = time.monotonic(), time.process_time()
        elif i > skip:
            images += len(batch.weak)
    return images / (time.monotonic() - start), first, 1000 * (time.process_time() - cpu) / images


def median_of(repeats: int, runs: dict[str, Callable[[], tuple[float, ...]]]) -> dict[str, list[float]]:
    """Medians of each run's numbers; the runs take turns."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(run())
            print(f"  {name:10} " + "  ".join(f"{value:8.2f}" for value in found[name][-1]), flush=True)
    return {name: [statistics.median(column) for column in zip(*rows)] for name, rows in found.items()}


def report(name: str, ours: float, theirs: float, unit: str = "images/s") -> None:
    ratio = round(ours / theirs, 3)
    print(json.dumps({"name": name, "ours": round(ours, 1), "theirs": round(theirs, 1), "ratio": ratio, "unit": unit}))


def bench_training(arguments: argparse.Namespace, table: pa.Table, data: DataConfig) -> None:
    steps = Steps(table, data, arguments.batch, arguments.steps)
    runtime = RuntimeConfig(
        reads_per_stream=arguments.num_workers, cpus_per_read=0.5, stream_memory_mb=arguments.stream_memory_mb
    )
    records = ray.put(table)
    skip = arguments.skip
    print("training: images/s, seconds to the first batch, CPU ms an image in this process")
    medians = median_of(
        arguments.repeats,
        {
            "loop": lambda: measure(run_loop(steps), skip),
            "loader": lambda: measure(run_loader(steps, arguments.num_workers), skip),
            "ours": lambda: measure(run_stream(steps, records, runtime), skip),
        },
    )
    for rival in ("loop", "loader"):
        report(f"training stream against {rival}", medians["ours"][0], medians[rival][0])


def bench_here(arguments: argparse.Namespace, table: pa.Table, data: DataConfig) -> None:
    """CPU time of reading, views and collation alone, for a machine that others use too."""
    steps = Steps(table, data, arguments.batch, arguments.steps)
    print("training in one process: images/s, seconds to the first batch, CPU ms an image")
    medians = median_of(
        arguments.repeats,
        {
            "loop": lambda: measure(run_loop(steps), arguments.skip),
            "ours": lambda: measure(run_here(steps), arguments.skip),
        },
    )
    ours, theirs = (1000 / medians[name][2] for name in ("ours", "loop"))
    report(f"training stream in one process, {arguments.format}, CPU", ours, theirs)


def bench_labelling(arguments: argparse.Namespace, table: pa.Table, folder: Path) -> None:
    image_px = tuple(arguments.image_px)
    store = ArtifactStore(str(folder / "storage"))
    teacher = Stage("adapt", "train", {"data": {"image_px": list(image_px)}}, {}, "a" * 20)
    segmenter = build_segmenter(build_recipe("coco").teacher.segmenter, len(CATEGORIES), seed=0)
    save_model(store, teacher, segmenter, CATEGORIES)
    store.commit(teacher, {})
    pseudo = PseudoConfig(score_threshold=0.02)
    config = {"pseudo": pseudo.model_dump(), "data": {"image_px": list(image_px)}, "batch": FIXED_SIZE_BATCH}
    runtime = {"runtime.num_labellers": 1, "runtime.cpus_per_labeller": 0.5, "runtime.cpus_per_read": 0.5}
    recipe = build_recipe("coco", overrides=runtime)
    repeated = pa.concat_tables([table] * -(-arguments.num_labelled // table.num_rows)).slice(0, arguments.num_labelled)
    records = ray.put(repeated.combine_chunks())
    images = Images(records, np.zeros(0, np.int64), np.arange(repeated.num_rows), CATEGORIES)
    runs = iter(range(1000))

    def stage() -> Stage:
        return Stage("label", "label", config, {"teacher": teacher.fingerprint}, f"{next(runs):020d}")

    labeller = PseudoLabeller(store, stage(), torch.device("cpu"))
    fitted = [fit_image(read_image(uri), image_px) for uri in table.column("uri").to_pylist()[: 2 * labeller.batch]]
    size = (table.column("height")[0].as_py(), table.column("width")[0].as_py())

    def inference() -> tuple[float, ...]:
        seconds = 0.0
        for start in range(0, len(fitted), labeller.batch):
            part = fitted[start : start + labeller.batch]
            pixels = [pixels for pixels, _ in part]
            pictures = Pictures(list(range(len(part))), pixels, [size] * len(part), [hw for _, hw in part])
            began = time.monotonic()
            labeller.label(pictures)
            seconds += time.monotonic() - began
        return (len(fitted) / seconds, 0.0)

    def job() -> tuple[float, ...]:
        board = Board.remote()  # type: ignore[attr-defined]
        began = time.monotonic()
        label_images(LabelJob(store, stage(), images, board, "", recipe))
        wall = time.monotonic() - began
        rate, first = ray.get(board.pace.remote(began))
        print(f"    whole job {wall:.1f} s for {repeated.num_rows} images")
        return rate, first

    print("labelling: images/s (after the first block), seconds to the first block")
    medians = median_of(arguments.repeats, {"inference": inference, "ours": job})
    report("labelling job against bare inference", medians["ours"][0], medians["inference"][0])
    ended = {"name": "start of a labelling job", "ours": round(medians["ours"][1], 1), "unit": "s"}
    print(json.dumps(ended))


@ray.remote(num_cpus=0)
class Board:
    """Stands for the broker: when which images were done."""

    def __init__(self) -> None:
        self.done: list[tuple[float, int]] = []

    def post(self, owner: str, facts: dict[str, Any]) -> None:
        pass

    def advance(self, owner: str, count: int) -> None:
        self.done.append((time.monotonic(), count))

    def pace(self, began: float) -> tuple[float, float]:
        """Images/s from the first block to the last, and seconds to the first; one machine, so one clock."""
        (first, _), *rest = self.done
        return sum(count for _, count in rest) / (rest[-1][0] - first), first - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-px", type=int, nargs=2, default=(512, 1024), help="crop height and width")
    parser.add_argument("--file-px", type=int, nargs=2, help="height and width of the files (default: twice the crop)")
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg", help="of the files; Cityscapes' are PNG")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--num-instances", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8, help="images a step, half of them labelled")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--skip", type=int, default=8, help="first steps that are not timed")
    parser.add_argument("--num-workers", type=int, default=2, help="loader processes and decoding tasks")
    parser.add_argument("--stream-memory-mb", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-labelled", type=int, default=192, help="images of the labelling job")
    parser.add_argument("--only", choices=("training", "labelling"))
    parser.add_argument("--native", action="store_true", help="scales of the jitter are relative to the file's pixels")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of one process for each, without Ray")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prepare_process()
    height, width = arguments.file_px or [2 * n for n in arguments.image_px]
    size: Any = "native" if arguments.native else "fit"
    data = DataConfig(image_px=tuple(arguments.image_px), scale_jitter=(0.5, 2.0), train_resize=size)
    with tempfile.TemporaryDirectory() as folder:
        table = draw_images(
            Path(folder), arguments.num_images, height, width, arguments.num_instances, arguments.format
        )
        if arguments.cpu:
            bench_here(arguments, table, data)
            return
        print(connect("local").description)
        if arguments.only != "labelling":
            bench_training(arguments, table, data)
        if arguments.only != "training":
            bench_labelling(arguments, table, Path(folder))
        ray.shutdown()


if __name__ == "__main__":
    main()
