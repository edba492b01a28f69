"""A loss term of your own: predicted masks should be either sure or absent, so uncertain pixels cost something.

Run this in the folder that holds this file, so that Python finds the module `own_loss`:

    cast-ray ablate losses --preset shapes --rows sup --set loss.extra_term=own_loss:uncertainty \
        --set loss.extra_weight=0.1

The term is added to the student's J in step 2b (`distill`), for all its images. Its curve is `extra` in the report.
The text of this file is part of the stage's fingerprint: change it, and the stage is trained again. A file that it
imports is not. The term belongs to the student only; the teacher's steps and step 3 do not have it.
"""

import torch

from cast_ray.contracts.records import Batch
from cast_ray.models.cast_network import Output


def uncertainty(output: Output, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the summed entropy of all mask pixels, and how many they are.

    Return a sum and a count, never their quotient: the training loop adds both up over all workers before it divides,
    so that the number of workers does not change the gradient.

    Args:
        output: `output.predictions.mask_logits[-1]` is [B, queries, h, w] of the last decoder layer.
        batch: the step's images, targets and, for each pixel, whether it is of the image or padding (`batch.valid`).
    """
    probability = output.predictions.mask_logits[-1].float().sigmoid()
    entropy = torch.special.entr(probability) + torch.special.entr(1 - probability)
    return entropy.sum(), torch.tensor(float(entropy.numel()), device=entropy.device)
