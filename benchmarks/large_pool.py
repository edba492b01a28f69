"""An unlabelled pool of 1,000,000 images with pseudo-labels of 5 instances each: from the records to the first batch.

    python benchmarks/large_pool.py [--sizes 10000 1000000]

Measured for both sizes, each in a process of its own and without Ray: the choice of D_l and D_u, as planning makes it,
and the time from the records to the first batch of a training stream; and how far both let this process grow beyond the
tables, which a run keeps in the object store. The images are copies of one small file. The last line says by how much
more the time grows than the number of images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from measure import memory_growth_mb, report
from PIL import Image

from cast_ray.contracts.records import INSTANCE_TYPE, RECORD_SCHEMA, Category
from cast_ray.data import batches, views  # noqa: F401  (what a stream imports when it starts is not counted)
from cast_ray.data.formats.segmentations import encode_mask
from cast_ray.data.splits.fractions import label_index, split
from cast_ray.recipe import DataConfig, RuntimeConfig
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.training_stream import SampleRules, StepShare, training_stream

INSTANCES, SIDE, STEPS, BATCH = 5, 64, 10_000, 8
CATEGORIES = (Category(1, "disc"),)


def make_records(size: int, file: Path) -> pa.Table:
    y, x = np.ogrid[:SIDE, :SIDE]
    rle = encode_mask((y - 32) ** 2 + (x - 32) ** 2 < 200)
    number = size * INSTANCES
    columns = {
        "category_id": np.ones(number, np.int64),
        "rle": pa.array([rle], pa.binary()).take(pa.array(np.zeros(number, np.int64))),
        "score": np.full(number, 0.9, np.float32),
        "is_crowd": pa.array(np.zeros(number, bool)),
        "area": np.full(number, 200.0),
    }
    arrays = [pa.array(columns[field.name], field.type) for field in INSTANCE_TYPE]
    instances = pa.StructArray.from_arrays(arrays, fields=list(INSTANCE_TYPE))
    lists = pa.ListArray.from_arrays(pa.array(np.arange(size + 1, dtype=np.int32) * INSTANCES), instances)
    same = pa.array(np.zeros(size, np.int64))
    side = pa.array(np.full(size, SIDE, np.int32))
    ids, uris = pa.array(np.arange(size)).cast(pa.string()), pa.array([str(file)]).take(same)
    return pa.Table.from_arrays([ids, uris, side, side, lists], schema=RECORD_SCHEMA)


def run_alone(size: int, folder: Path) -> None:
    """Prints the seconds of the choice and of the first batch, and the growth of this process in MB."""
    file = folder / "a.png"
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(file)
    records = make_records(size, file)
    index, data = label_index(records), DataConfig(image_px=(SIDE, SIDE), label_fraction=0.01)
    seconds: list[float] = []

    def run() -> None:
        began = time.process_time()
        chosen = split(index, data, 0)
        seconds.append(time.process_time() - began)
        began = time.process_time()
        labels = records.slice(len(chosen.labelled))
        images = Images(records, chosen.labelled, chosen.unlabelled, CATEGORIES, labels)
        share = StepShare(BATCH // 2, BATCH // 2, STEPS, seed=0)
        next(iter(training_stream(images, data, RuntimeConfig(), share, SampleRules(strong=True))))
        seconds.append(time.process_time() - began)

    grown = memory_growth_mb(run)
    print("\n" + json.dumps([*seconds, grown]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=(10_000, 1_000_000))
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.alone:
            run_alone(options.alone, Path(folder))
            return
    found = []
    for size in options.sizes:
        command = [sys.executable, __file__, "--alone", str(size)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(printed.splitlines()[-1]))
        print("{:,} images: choice {:.2f} s, first batch {:.2f} s, +{:.0f} MB".format(size, *found[-1]))
    (small, large), growth = (row[0] + row[1] for row in found), options.sizes[1] / options.sizes[0]
    report("first batch of a large pool, memory against the target", found[1][2], 1024, "MB")
    report("first batch of a large pool, against linear growth", large, small * growth, "s")


if __name__ == "__main__":
    main()
