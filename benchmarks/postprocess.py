"""Post-processing of one photograph of 24 megapixels: with the least score known beforehand, and filtered afterwards.

    python benchmarks/postprocess.py [--quick] [--cpu] [--threshold 0.0 0.3 0.5]

A student's 100 queries on a photograph of 4000 x 6000 pixels: 8 are sure of their class (P 0.6 to 0.95), 8 less so (0.3
to 0.5), the others below 0.1; 80 classes, logits of 256 x 256 for a crop of 1024 x 1024. `theirs` brings the masks of
the best 100 pairs of query and class to the image's size and then drops those below the threshold; `ours` makes only
those that can reach it. Both must give the same instances, bytes of the masks included, before times count.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from measure import clock, interleaved, report, spread

from cast_ray.contracts.instance import Instances
from cast_ray.models.postprocess import to_instances

IMAGE_HW, RESIZED_HW, CROP = (4000, 6000), (683, 1024), (1024, 1024)
NUM_QUERIES, NUM_CLASSES, MASK_HW = 100, 80, (256, 256)
NUM_SURE = 8


def make_predictions() -> tuple[torch.Tensor, torch.Tensor]:
    """class_logits [1, Q, C+1] and mask_logits [1, Q, h, w]: smooth blobs."""
    g = torch.Generator().manual_seed(0)
    best_Q = torch.empty(NUM_QUERIES).uniform_(0.01, 0.1, generator=g)
    best_Q[:NUM_SURE] = torch.linspace(0.6, 0.95, NUM_SURE)
    best_Q[NUM_SURE : 2 * NUM_SURE] = torch.linspace(0.31, 0.49, NUM_SURE)
    rest_QC = torch.rand(NUM_QUERIES, NUM_CLASSES + 1, generator=g)
    label_Q = torch.randint(NUM_CLASSES, (NUM_QUERIES,), generator=g)
    query_Q = torch.arange(NUM_QUERIES)
    rest_QC[query_Q, label_Q] = 0
    rest_QC[:, -1] = 20  # most of the rest is no object
    rest_QC *= ((1 - best_Q) / rest_QC.sum(1))[:, None]
    rest_QC[query_Q, label_Q] = best_Q
    blobs = F.interpolate(torch.randn(1, NUM_QUERIES, 6, 6, generator=g), size=MASK_HW, mode="bicubic")
    return rest_QC.log()[None], 8 * blobs - 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat, no warm-up, for a look")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, for a machine others use too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.0, 0.5, 0.3])
    options = parser.parse_args()
    now = clock(options.cpu)
    predictions = make_predictions()
    found: dict[str, Instances] = {}

    def timed(name: str, min_score: float = 0.0) -> float:
        start = now()
        (found[name],) = to_instances(predictions, [IMAGE_HW], [RESIZED_HW], CROP, 100, min_score)
        return now() - start

    # Whatever is dropped afterwards, all masks are made first: one time for all thresholds.
    variants = {"theirs": partial(timed, "theirs")}
    variants |= {f"ours at {least}": partial(timed, f"ours at {least}", least) for least in options.threshold}
    seconds = interleaved(variants, 1 if options.quick else options.repeats, warm_up=not options.quick)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print(f"theirs           {spread(seconds['theirs'])}")
    for least in options.threshold:
        name = f"ours at {least}"
        assert found[name] == [i for i in found["theirs"] if i["score"] >= least]
        print(f"{name:16} {spread(seconds[name])}, {len(found[name])} instances")
        report(f"24 megapixels at threshold {least}", medians[name], medians["theirs"], "s")


if __name__ == "__main__":
    main()
