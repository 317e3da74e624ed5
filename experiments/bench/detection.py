"""Measures detectors' suppression and RoIAlign, against torchvision's on the same cores."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import _timing as timing
from experiments.bench._timing import Call, Key, Times, figures
from wsbcn_flax.ops.detection import nms, roi_align

NMS_THRESHOLD = 0.7
STRIDE = 8  # Pixels of the image for one pixel of the feature map.
_GRIDS = (7, 14)  # Bins along a side for the box head and the mask head.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection(timing.Measurement):
    """Times suppression and RoIAlign, forward and backward.

    Attributes:
        boxes: Numbers of boxes to suppress, as many as one level of the pyramid proposes.
        regions: Number of regions to pool in one image.
        feature_map: Height, width and channels of the feature map, at a stride of 8 pixels.
        against: "torch" adds torchvision's operations.
    """

    repeats: int = 20
    boxes: tuple[int, ...] = (1000, 2000)
    regions: int = 512
    feature_map: tuple[int, int, int] = (100, 168, 256)
    against: Literal["torch"] | None = None

    def __post_init__(self):
        super().__post_init__()
        if min(*self.boxes, self.regions, *self.feature_map) < 1:
            raise ValueError(
                f"boxes, regions and feature_map must be positive, received {self.boxes}, "
                f"{self.regions} and {self.feature_map}."
            )

    def measure(self) -> list[dict[str, Any]]:
        """Measures, prints a table, and returns a row for each operation and pass."""
        torch = timing.load_torch() if self.against else None
        rows = []
        for count in self.boxes:
            boxes, scores = random_boxes(count, self.feature_map)
            calls = nms_calls(boxes, scores)
            calls |= torch.nms_calls(boxes, scores) if torch else {}
            rows += _rows(
                f"nms of {count:,}", timing.interleaved_seconds(calls, rounds=self.rounds)
            )
        boxes, _ = random_boxes(self.regions, self.feature_map)
        for bins in _GRIDS:
            cotangent_shape = (self.regions, bins, bins, self.feature_map[-1])
            features, cotangent = timing.normal_arrays((1, *self.feature_map), cotangent_shape)
            calls = roi_calls(features, cotangent, boxes)
            calls |= torch.roi_calls(features, cotangent, boxes) if torch else {}
            seconds = timing.interleaved_seconds(calls, rounds=self.rounds)
            rows += _rows(f"roi_align {bins}x{bins}", seconds)
        timing.print_rows("Operations of detectors", rows)
        return rows


def random_boxes(count: int, feature_map: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes [count, 4] around few centers, so that many overlap, and scores [count]."""
    generator = np.random.default_rng(0)
    size = STRIDE * np.array(feature_map[1::-1])
    centers = generator.uniform(0, size, (1 + count // 20, 2))
    centers = centers[generator.integers(len(centers), size=count)]
    centers = centers + generator.normal(0, 8, (count, 2))
    sides = np.exp(generator.uniform(np.log(32), np.log(256), (count, 2)))
    boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)
    boxes = np.clip(boxes, 0, np.tile(size, 2))
    return boxes.astype(np.float32), generator.uniform(size=count).astype(np.float32)


def nms_calls(boxes: np.ndarray, scores: np.ndarray) -> dict[Key, Call]:
    """Makes the call of our suppression."""
    call = jax.jit(functools.partial(nms, iou_threshold=NMS_THRESHOLD))
    return {("ours", "forward"): functools.partial(call, jnp.asarray(boxes), jnp.asarray(scores))}


def roi_calls(features: np.ndarray, cotangent: np.ndarray, boxes: np.ndarray) -> dict[Key, Call]:
    """Makes the calls of our RoIAlign on features [1, H, W, C], with both implementations."""
    image_index = jnp.zeros(len(boxes), jnp.int32)
    calls: dict[Key, Call] = {}
    for implementation in ("gather", "einsum"):

        def pool(boxes, features, implementation: Any = implementation):
            return roi_align(
                features,
                boxes,
                image_index,
                output_size=cotangent.shape[1],
                spatial_scale=1 / STRIDE,
                implementation=implementation,
            ), None

        arguments = map(jnp.asarray, (boxes, cotangent, features))
        calls |= timing.both_passes(implementation, pool, *arguments)
    return calls


def _rows(operation: str, seconds: Times) -> list[dict[str, Any]]:
    """Returns a row for each form and pass, with its ratio to torchvision's where that is timed."""
    rows = []
    for (form, which), times in seconds.items():
        theirs = seconds.get(("torch", which))
        references = {} if theirs is None else {"torch": theirs}
        row = {"operation": operation, "form": form, "pass": which}
        rows.append(row | figures(times, **references))
    return rows
