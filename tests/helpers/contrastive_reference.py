"""L_pxl written as slow, obvious loops over pixels, straight from the formulas."""

import itertools
import math

import torch
import torch.nn.functional as F


def pseudo_labels(mask_logits, class_logits, size, config):
    """y~ of each pixel as two lists of parts: (mask part, class part)[b][p]."""
    images, (h, w) = mask_logits.shape[0], size
    resized = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False)
    rows = []
    for b in range(images):
        row = []
        for p in range(h * w):
            p_m = resized[b, :, p // w, p % w].softmax(0)
            f_c = sum(p_m[k] * class_logits[b, k].softmax(0) for k in range(len(p_m)))
            parts = {"mask": [p_m], "class": [f_c], "fusion": [p_m, f_c]}.get(config.sampler, [p_m])
            y = torch.cat(parts)
            norm = y.norm() if config.normalise == "l2" else y.sum()
            nothing = p_m[:0]
            row.append(
                (
                    p_m / norm if config.sampler in ("mask", "fusion") else nothing,
                    f_c / norm if config.sampler in ("class", "fusion") else nothing,
                )
            )
        rows.append(row)
    return rows


def centres(maps, size):
    """[B, H, W] at the centres of an h x w grid, as nested lists [b][p]."""
    h, w = size
    high, wide = maps.shape[1] / h, maps.shape[2] / w
    return [
        [maps[b, int((p // w + 0.5) * high), int((p % w + 0.5) * wide)].item() for p in range(h * w)]
        for b in range(maps.shape[0])
    ]


def negative_weight(y, truth, config, anchor, candidate):
    """Probability, up to a factor, of drawing `candidate` for `anchor`, both (b, p)."""
    same_image = anchor[0] == candidate[0]
    if anchor == candidate:
        return 0.0
    if (config.scope == "same-image" and not same_image) or (config.scope == "cross-image" and same_image):
        return 0.0
    if config.sampler == "uniform":
        return 1.0
    if config.sampler == "oracle":
        a, q = truth[anchor[0]][anchor[1]], truth[candidate[0]][candidate[1]]
        if a < 0 or q < 0 or (a == 0 and q == 0):
            return 0.0
        return 0.0 if same_image and a == q else 1.0
    (mask_a, class_a), (mask_q, class_q) = y[anchor[0]][anchor[1]], y[candidate[0]][candidate[1]]
    inner = float(class_a @ class_q)
    if same_image:  # query slots of different images are different slots
        inner += float(mask_a @ mask_q)
    return max(0.0, 1.0 - inner) if 1.0 - inner > 1e-5 else 0.0


def all_weights(mask_logits, class_logits, valid, truth_instance, size, config):
    """{anchor: {candidate: weight}} over all valid pixels, zero weights left out."""
    y = pseudo_labels(mask_logits, class_logits, size, config)
    inside, truth = centres(valid, size), centres(truth_instance, size)
    pixels = [(b, p) for b in range(len(inside)) for p in range(size[0] * size[1]) if inside[b][p]]
    weights = {}
    for a in pixels:
        row = {q: negative_weight(y, truth, config, a, q) for q in pixels}
        weights[a] = {q: v for q, v in row.items() if v > 0}
    return weights


def similarity(z, other, anchor, candidate, temperature):
    return z[anchor[0], :, anchor[1]] @ other[candidate[0], :, candidate[1]] / temperature


def term(positive, negatives, hinge):
    """-log( e^{s+} / (e^{s+} + sum c e^{s-}) ) of (s-, c) pairs."""
    total = positive.exp()
    for s, c in negatives:
        if hinge is not None:
            s = (s - hinge).clamp(min=0)
        total = total + c * s.exp()
    return -(positive.exp() / total).log()


def dense_loss(z_weak, z_strong, weights, config, temperature, how):
    """(sum, count) over anchors with a negative.

    how: "expectation", R sum_q w_q e^{s-_q}; "all", each candidate once (R >= candidates without replacement);
    "every draw", the exact mean of the sampled loss over all systematic draws; "every Gumbel draw", over all draws
    without replacement.
    """
    z_weak, z_strong = z_weak.flatten(2), z_strong.flatten(2)
    total, count = z_weak.sum() * 0, 0
    for anchor, row in weights.items():
        if not row:
            continue
        count += 1
        positive = similarity(z_weak, z_strong, anchor, anchor, temperature)
        s = {q: similarity(z_weak, z_weak, anchor, q, temperature) for q in row}
        mass = sum(row.values())
        if how == "expectation":
            pairs = [(s[q], config.num_negatives * row[q] / mass) for q in row]
            total = total + term(positive, pairs, config.hinge)
        elif how == "all":
            total = total + term(positive, [(s[q], 1.0) for q in row], config.hinge)
        else:
            enumerate_draws = systematic_draws if how == "every draw" else gumbel_draws
            for chance, draws in enumerate_draws(row, config.num_negatives):
                total = total + chance * term(positive, [(s[q], 1.0) for q in draws], config.hinge)
    return total, count


def gumbel_draws(row, r):
    """All (chance, draws) of r draws one after the other without putting back: the law of Gumbel top-k."""
    for draws in itertools.permutations(row, min(r, len(row))):
        chance, left = 1.0, sum(row.values())
        for q in draws:
            chance *= row[q] / left
            left -= row[q]
        yield chance, draws


def systematic_draws(row, r):
    """All (chance, draws) of a systematic sample: the candidates under the points 1 - start, ..., r - start."""
    mass, reached, spans = sum(row.values()), 0.0, []
    for q, weight in row.items():
        spans.append((q, reached, reached + r * weight / mass))
        reached += r * weight / mass
    starts = sorted({0.0, 1.0} | {math.ceil(high) - high for _, _, high in spans[:-1]})
    for low, high in itertools.pairwise(starts):
        start = (low + high) / 2
        points = [k - start for k in range(1, r + 1)]
        last = spans[-1][0]
        yield high - low, [next((q for q, a, b in spans if a < point <= b), last) for point in points]
