"""Oracles of detection: its operations as plain float64 loops, and torchvision's results."""

import math
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden" / "detection_ops.npz"


def golden(prefix):
    """Loads arrays that torchvision 0.29.1 computed, by their names without ``prefix``."""
    with np.load(GOLDEN) as archive:
        return {
            name.removeprefix(prefix): archive[name]
            for name in archive.files
            if name.startswith(prefix)
        }


def random_boxes(seed, count, *, extent=100.0, side=30.0):
    """Makes boxes [count, 4] of many sides and shapes; some cross the border of the extent."""
    rng = np.random.default_rng(seed)
    center = rng.uniform(0, extent, (count, 2))
    half = side * np.exp(rng.normal(0, 0.5, (count, 2))) / 2
    return np.concatenate([center - half, center + half], -1).astype(np.float32)


def iou(a, b, pixel=0):
    """Computes the IoU of two boxes."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def area(x1, y1, x2, y2):
        return max(x2 - x1 + pixel, 0) * max(y2 - y1 + pixel, 0)

    overlap = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - overlap
    return overlap / union if union > 0 else 0.0


def nms(boxes, scores, threshold, pixel=0):
    """Suppresses boxes greedily, one at a time; returns flags."""
    keep = np.zeros(len(boxes), bool)
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        keep[i] = all(iou(boxes[i], boxes[j], pixel) <= threshold for j in np.flatnonzero(keep))
    return keep


def roi_align(image, box, size, *, spatial_scale, samples, aligned):
    """Applies RoIAlign to one box and image [H, W, C]; ``samples=None`` adapts their number."""
    image = np.asarray(image, np.float64)
    x1, y1, x2, y2 = np.asarray(box, np.float64) * spatial_scale - (0.5 if aligned else 0)
    least = -math.inf if aligned else 1
    step_y, step_x = max(y2 - y1, least) / size, max(x2 - x1, least) / size
    down, across = (samples or math.ceil(step) for step in (step_y, step_x))
    out = np.zeros((size, size, image.shape[-1]))
    for i, j in np.ndindex(size, size):
        for s, t in np.ndindex(down, across):
            y, x = y1 + (i + (s + 0.5) / down) * step_y, x1 + (j + (t + 0.5) / across) * step_x
            out[i, j] += bilinear(image, y, x) / (down * across)
    return out


def bilinear(image, y, x):
    """Interpolates the image at a point: clamped up to one pixel outside, zero beyond."""
    height, width = image.shape[:2]
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    return (1 - v) * ((1 - u) * image[top, left] + u * image[top, right]) + v * (
        (1 - u) * image[bottom, left] + u * image[bottom, right]
    )
