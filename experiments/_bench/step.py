"""A whole training step of one network with each normalization, against BatchNorm's."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from experiments._bench.networks import NORMS, QUICK_RECIPE, recipes_with_norms
from experiments._bench.options import TimedOptions, check_writable, save
from experiments._bench.printing import machine_facts, progress_bar, rows_table, two_decimals
from experiments._bench.timing import Call, interleaved_seconds, median_and_spread, ratio
from experiments._bench.torch_extra import check_torch, keep_faster_format, torch_facts
from experiments._bench.weights import closed_form_call
from experiments._config import Recipe
from experiments._data_specs import DATA_SPECS
from experiments._run import make_partition, make_state, make_steps

_OURS, _TORCH, _WS_ALONE = "gn_ws", "torch_gn_ws", "ws_alone"
_QUICK_IMAGE_SIZE = 32
_Key = tuple[str, Literal["step"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(TimedOptions):
    """A training step of a network, SGD with momentum in float32, against BatchNorm's.

    Attributes:
        recipe: name of one; its network and optimizer are what counts. A small one if ``quick``.
        norms: {norm}[_{weight}] as in a recipe's name; bn among them. With bcn and bcn_ws, what
            weight standardization adds is compared with what it takes alone.
        image_size: height and width of the images; 32 at most if ``quick``.
        batch: images in a step.
        micro: images in a micro-batch, the whole batch if None; of ours alone, not PyTorch's.
        against: "torch" adds ResNet-50 with GN+WS in PyTorch, in the faster of its two memory
            formats.
        repeats: rounds in which each step is timed once; three at most if ``quick``.
    """

    recipe: str = "imagenet_resnet50_bcn_ws"
    norms: tuple[str, ...] = NORMS
    image_size: int = 128
    batch: int = 2
    micro: int | None = None
    against: Literal["torch"] | None = None
    repeats: int = 30

    def __post_init__(self):
        super().__post_init__()
        if min(self.image_size, self.batch) < 1:
            raise ValueError(
                f"image_size and batch must be at least 1, received {self.image_size} and "
                f"{self.batch}."
            )
        recipes = recipes_with_norms(self.recipe, self.norms)
        if self.against == "torch" and recipes["bn"].model.name != "resnet50":
            raise ValueError(
                "--against torch has a ResNet-50 alone to compare with, received the recipe "
                f"{self.recipe}. Leave out --recipe."
            )
        if self.against == "torch" and _OURS not in recipes:
            raise ValueError(
                f"--against torch compares with {_OURS}, which norms must name, received "
                f"{', '.join(self.norms)}."
            )

    @property
    def measured(self) -> tuple[str, int]:
        """The recipe and the size of images that are measured."""
        if self.quick:
            return QUICK_RECIPE, min(self.image_size, _QUICK_IMAGE_SIZE)
        return self.recipe, self.image_size


def run_step(config: Step, console: Console) -> dict[str, Any]:
    """Measures, prints and returns the figures of ``step``, writing them where asked to.

    Returns:
        ``"rows"``, one for each normalization; ``"ws"``, what weight standardization adds to a
        step, or None; ``"torch"``, our step's time over PyTorch's, or None.

    Raises:
        ImportError: if PyTorch is asked for and not installed; names the extra.
        OSError: if the file cannot be written.
    """
    check_writable(config.json)
    if config.against == "torch":
        check_torch()
    recipe_name, image_size = config.measured
    ours = {
        name: TrainingCall(recipe, image_size, config.batch, micro=config.micro)
        for name, recipe in recipes_with_norms(recipe_name, config.norms).items()
    }
    calls: dict[_Key, Call] = {(name, "step"): call for name, call in ours.items()}
    if {"bcn", "bcn_ws"} <= set(ours):
        calls[_WS_ALONE, "step"] = closed_form_call(ours["bcn_ws"].kernel_shapes())
    if config.against == "torch":
        calls |= _torch_calls(image_size, config.batch)
    with progress_bar(len(calls) + config.rounds, "compiling, measuring") as advance:
        timed = interleaved_seconds(calls, rounds=config.rounds, on_warm=advance, on_round=advance)
    kept, formats = keep_faster_format(timed)
    seconds = {name: times for (name, _), times in kept.items()}
    alone = seconds.pop(_WS_ALONE, None)
    document = {
        "machine": machine_facts(),
        "rows": step_rows(seconds),
        "ws": None if alone is None else ws_in_step(seconds, alone),
        "torch": None,
    }
    if config.against == "torch":
        document["torch"] = {
            "version": torch_facts(),
            "memory_format": formats[_TORCH, "step"],
            "ratio_to_torch": ratio(seconds[_OURS], seconds[_TORCH]),
        }
    _print(config, document, console)
    save(config.json, document)
    return document


class TrainingCall:
    """A training step on one device that goes on from where its last call left off.

    The compiled step takes the memory of the state it is given, so that each call must be given
    the one before's. Images are random and the same at every step, and the learning rate is so low
    that numbers stay what they are in training.

    Args:
        recipe: what to train; its batch is replaced.
        image_size: height and width of the images.
        batch: images in a step.
        micro: images in a micro-batch; the whole batch if None.

    Raises:
        ValueError: for a batch that is not a whole number of micro-batches.
    """

    def __init__(self, recipe: Recipe, image_size: int, batch: int, *, micro: int | None = None):
        spec = DATA_SPECS[recipe.data.name]
        recipe = dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, dtype="float32"),
            batch=dataclasses.replace(recipe.batch, size=batch, micro=micro, loop="auto"),
            optim=dataclasses.replace(recipe.optim, learning_rate=1e-3, warmup_epochs=0.0),
        )
        partition = make_partition(recipe.batch, jax.devices()[:1])
        steps = make_steps(
            recipe, partition, num_classes=spec.num_classes, steps_per_epoch=spec.train_size
        )
        image_shape = (image_size, image_size, spec.image_shape[-1])
        make = functools.partial(
            make_state,
            steps.task,
            steps.optimizer,
            transform=steps.transform,
            image_shape=image_shape,
        )
        self._step = partition.compile(steps.train)
        self._state = partition.place_state(make(recipe.seed))
        self._batch = partition.place_batch(
            random_batch((batch, *image_shape), num_classes=spec.num_classes)
        )

    def __call__(self) -> Any:
        """The state after one more step, and its metrics."""
        self._state, metrics = self._step(self._state, self._batch)
        return self._state, metrics

    def kernel_shapes(self) -> list[tuple[int, int, int, int]]:
        """The shapes, HWIO, of all convolution kernels."""
        return [array.shape for array in jax.tree.leaves(self._state.params) if array.ndim == 4]


def random_batch(shape: tuple[int, int, int, int], *, num_classes: int) -> dict[str, np.ndarray]:
    """Images of a normal distribution and labels, the same in every run."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, num_classes, shape[0], np.int32)
    return {"image": generator.standard_normal(shape, np.float32), "label": labels}


def _torch_calls(image_size: int, batch: int) -> dict[_Key, Call]:
    from experiments._bench.torch_step import torch_step_calls

    shape = (batch, image_size, image_size, 3)
    calls = torch_step_calls(_TORCH, random_batch(shape, num_classes=1000))
    return {(name, "step"): call for name, call in calls.items()}


def step_rows(seconds: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row for each normalization, ready for JSON."""
    return [
        {
            "norm": name,
            "ratio_to_batchnorm": ratio(times, seconds["bn"]),
            **median_and_spread(times),
        }
        for name, times in seconds.items()
    ]


def ws_in_step(seconds: Mapping[str, np.ndarray], alone: np.ndarray) -> dict[str, float]:
    """What weight standardization adds to BCN's step, and that over what it takes alone."""
    added = float(np.median(seconds["bcn_ws"] - seconds["bcn"]))
    by_itself = float(np.median(alone))
    return {
        "added_ms": added * 1e3,
        "alone_ms": by_itself * 1e3,
        "added_over_alone": added / by_itself,
        "share_of_step": added / float(np.median(seconds["bcn_ws"])),
    }


def _print(config: Step, document: Mapping[str, Any], console: Console) -> None:
    console.print(document["machine"])
    recipe_name, image_size = config.measured
    title = f"A step of {recipe_name}: {config.batch} images of {image_size} pixels"
    if config.micro is not None:
        title += f", micro-batches of {config.micro}"
    figures = {
        "ratio_to_batchnorm": ("/ BatchNorm's", two_decimals),
        "median_ms": ("ms", "{:.1f}".format),
        "spread": ("spread", two_decimals),
    }
    console.print(
        rows_table(document["rows"], title=title, labels={"norm": "norm"}, figures=figures)
    )
    if ws := document["ws"]:
        console.print(
            f"Weight standardization adds {ws['added_ms']:.1f} ms to BCN's step, "
            f"{ws['added_over_alone']:.2f} times the {ws['alone_ms']:.1f} ms it takes alone, "
            f"{100 * ws['share_of_step']:.1f} % of the step with it."
        )
    if against := document["torch"]:
        console.print(
            f"GN+WS takes {against['ratio_to_torch']:.2f} times as long as in PyTorch "
            f"({against['version']}, {against['memory_format']}, its faster format)."
        )
