"""A whole training step of one network with each normalization, against BatchNorm's."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import rich

from experiments._recipe import Recipe
from experiments._tables import Column, machine_facts, table
from experiments._variants import with_norm
from experiments.bench import _timing as timing
from experiments.bench._timing import Call, Key, Shape
from experiments.bench.ws import weight_calls
from experiments.recipes import get_recipe

_QUICK_RECIPE, _QUICK_IMAGE_SIZE = "digits_resnet8_bcn_ws", 32
_OURS, _TORCH, _WS_ALONE = ("gn_ws", "step"), ("torch_gn_ws", "step"), ("ws_alone", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(timing.Measurement):
    """Times a training step of a network, SGD with momentum in float32, against BatchNorm's.

    Attributes:
        recipe: Name of a recipe, for its network and optimizer; that of a small one if ``quick``.
        norms: Normalizations, {norm}[_{weight}] as in a recipe's name; bn is always measured. With
            bcn and bcn_ws, the time that weight standardization adds is compared with its time
            alone.
        image_size: Side of ImageNet's images, in pixels; at most 32 if ``quick``. Others keep
            their size.
        batch: Number of images in a step.
        micro: Number of images in a micro-batch, the whole batch if None; not of PyTorch's.
        against: "torch" adds ResNet-50 with GN+WS, ours and PyTorch's, the latter in the faster of
            its two memory formats.
    """

    recipe: str = "imagenet_resnet50_bcn_ws"
    norms: tuple[str, ...] = ("bn", "gn", "naive_bcn", "bcn", "gn_ws", "bcn_ws")
    image_size: int = 128
    batch: int = 2
    micro: int | None = None
    against: Literal["torch"] | None = None
    repeats: int = 30

    def __post_init__(self):
        super().__post_init__()
        if self.against == "torch" and get_recipe(self.recipe).model.name != "resnet50":
            raise ValueError(
                "--against torch has a ResNet-50 alone to compare with, received the recipe "
                f"{self.recipe}. Leave out --recipe."
            )

    def measure(self) -> dict[str, Any]:
        """Measures, prints tables, and returns the figures.

        Returns:
            ``"machine"``; ``"rows"``, one for each normalization; ``"ws"``, the time that weight
            standardization adds to a step, or None; ``"torch"``, our step's time over PyTorch's, or
            None.
        """
        name = _QUICK_RECIPE if self.quick else self.recipe
        size = min(self.image_size, _QUICK_IMAGE_SIZE) if self.quick else self.image_size
        ours = {norm: with_norm(get_recipe(name), norm) for norm in ("bn", *self.norms)}
        torch = None
        if self.against == "torch":
            torch = timing.load_torch()
            ours.setdefault(_OURS[0], with_norm(get_recipe(name), _OURS[0]))
        steps = {
            norm: TrainingCall(x, size, self.batch, micro=self.micro) for norm, x in ours.items()
        }
        calls: dict[Key, Call] = {(norm, "step"): call for norm, call in steps.items()}
        if {"bcn", "bcn_ws"} <= set(steps):
            kernels = steps["bcn_ws"].kernel_shapes()
            calls[_WS_ALONE] = weight_calls(kernels)["closed_form", "forward_backward"]
        if torch is not None:
            calls |= torch.step_calls(_TORCH, random_batch((self.batch, size, size, 3)))
        timed = timing.interleaved_seconds(calls, rounds=self.rounds)
        seconds, formats = timing.keep_faster_format(timed)
        alone = seconds.pop(_WS_ALONE, None)
        document = {
            "machine": machine_facts(),
            "rows": step_rows(seconds),
            "ws": None if alone is None else ws_in_step(seconds, alone),
            "torch": torch
            and {
                "version": torch.facts(),
                "memory_format": formats[_TORCH],
                "ratio_to_torch": timing.ratio(seconds[_OURS], seconds[_TORCH]),
            },
        }
        micro = "" if self.micro is None else f", micro-batches of {self.micro}"
        side = steps["bn"].image_size
        _print(f"A step of {name}: {self.batch} images of {side} pixels{micro}", document)
        return document


class TrainingCall:
    """A training step on one device that continues from the state of its last call.

    The compiled step takes over the memory of the state it is given, so that each call must be
    given the state of the one before. Images are random and the same at every step, and the
    learning rate is so low that numbers stay what they are in training.

    Args:
        recipe: Recipe to train; its batch is replaced.
        image_size: Side of ImageNet's images.
        batch: Number of images in a step.
        micro: Number of images in a micro-batch; the whole batch if None.

    Raises:
        ValueError: For a batch that is not a whole number of micro-batches.
    """

    def __init__(self, recipe: Recipe, image_size: int, batch: int, *, micro: int | None = None):
        experiment = dataclasses.replace(
            recipe,
            data=dataclasses.replace(recipe.data, image_size=image_size),
            model=dataclasses.replace(recipe.model, dtype="float32"),
            batch=dataclasses.replace(recipe.batch, size=batch, micro=micro, loop="auto"),
            optim=dataclasses.replace(recipe.optim, learning_rate=1e-3, warmup_epochs=0.0),
        ).experiment()
        program = experiment.compile(jax.devices()[:1])
        shape = experiment.data.element_spec["image"].shape
        self.image_size = shape[0]
        self._step = program.train
        self._state = program.init(recipe.seed)
        self._batch = program.partition.place_batch(random_batch((batch, *shape)))

    def __call__(self) -> Any:
        """Returns the state after one more step, and its metrics."""
        self._state, metrics = self._step(self._state, self._batch)
        return self._state, metrics

    def kernel_shapes(self) -> list[Shape]:
        """Returns the shapes, HWIO, of all convolution kernels."""
        return [array.shape for array in jax.tree.leaves(self._state.params) if array.ndim == 4]


def random_batch(shape: Shape) -> dict[str, np.ndarray]:
    """Makes images of a normal distribution and labels, the same in every run."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, shape[0], np.int32)  # Every dataset has ten classes.
    return {"image": generator.standard_normal(shape, np.float32), "label": labels}


def step_rows(seconds: Mapping[Key, np.ndarray]) -> list[dict[str, Any]]:
    """Returns a row for each normalization, as JSON values."""
    return timing.ratio_rows(seconds, ("norm",), "ratio_to_batchnorm", lambda _: ("bn", "step"))


def ws_in_step(seconds: Mapping[Key, np.ndarray], alone: np.ndarray) -> dict[str, float]:
    """Returns the time that weight standardization adds to BCN's step, and its time alone."""
    whole = seconds["bcn_ws", "step"]
    added, by_itself = np.median(whole - seconds["bcn", "step"]), np.median(alone)
    return {
        "added_ms": float(added) * 1e3,
        "alone_ms": float(by_itself) * 1e3,
        "added_over_alone": float(added / by_itself),
        "share_of_step": float(added / np.median(whole)),
    }


def _print(title: str, document: Mapping[str, Any]) -> None:
    print(document["machine"])
    columns: dict[str, Column] = {
        "norm": ("norm", str),
        "ratio_to_batchnorm": ("/ BatchNorm's", "{:.2f}".format),
        "median_ms": ("ms", "{:.1f}".format),
        "spread": ("spread", "{:.2f}".format),
    }
    rich.print(table(title, document["rows"], columns))
    if ws := document["ws"]:
        print(
            f"Weight standardization adds {ws['added_ms']:.1f} ms to BCN's step, "
            f"{ws['added_over_alone']:.2f} times the {ws['alone_ms']:.1f} ms it takes alone, "
            f"{100 * ws['share_of_step']:.1f} % of the step with it."
        )
    if against := document["torch"]:
        print(
            f"GN+WS takes {against['ratio_to_torch']:.2f} times as long as in PyTorch "
            f"({against['version']}, {against['memory_format']}, its faster format)."
        )
