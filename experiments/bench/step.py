"""Measures a training step of one network with each normalization, relative to BatchNorm."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from experiments._recipe import Recipe
from experiments._variants import with_norm
from experiments.bench import _timing as timing
from experiments.bench._timing import Call, Key, Shape, Times, figures
from experiments.bench.ws import kernel_shapes, weight_calls
from experiments.recipes import get_recipe

_QUICK_RECIPE = "digits_resnet8_bcn_ws"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(timing.Measurement):
    """Times a network's training step, SGD with momentum in float32, relative to BatchNorm's.

    Attributes:
        recipe: Name of a recipe, for its network and optimizer; a small recipe if ``quick``.
        norms: Normalizations, {norm}[_{weight}] as in a recipe's name; bn is always measured. With
            bcn and bcn_ws, weight standardization is also timed alone.
        image_size: Side of ImageNet's images, in pixels; other images keep their size.
        batch: Number of images in a step.
        micro: Number of images in a micro-batch; the whole batch if None, and always for PyTorch.
        against: "torch" adds ResNet-50 with GN+WS, ours and PyTorch's in both memory formats.
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
                "--against torch compares only ResNet-50, received the recipe "
                f"{self.recipe}. Leave out --recipe."
            )

    def measure(self) -> list[dict[str, Any]]:
        """Measures, prints a table, and returns a row for each normalization and reference."""
        torch = timing.load_torch() if self.against else None
        name = _QUICK_RECIPE if self.quick else self.recipe
        norms = ("bn", *self.norms, *(["gn_ws"] if torch else []))
        recipes = {norm: with_norm(get_recipe(name), norm) for norm in norms}
        calls: dict[Key, Call] = {
            (norm, "step"): training_call(recipe, self.image_size, self.batch, micro=self.micro)
            for norm, recipe in recipes.items()
        }
        if {"bcn", "bcn_ws"} <= set(norms):
            state, _ = calls["bcn_ws", "step"]()
            forms = weight_calls(kernel_shapes(state.params))
            calls["ws_alone", "step"] = forms["closed_form", "forward_backward"]
        if torch is not None:
            images = (self.batch, self.image_size, self.image_size, 3)
            calls |= torch.step_calls("torch_gn_ws", random_batch(images))
        rows = step_rows(timing.interleaved_seconds(calls, rounds=self.rounds))
        timing.print_rows(f"{name}'s network, {self.batch} images a step", rows)
        return rows


def training_call(recipe: Recipe, image_size: int, batch: int, *, micro: int | None = None) -> Call:
    """Makes a recipe's training step on one device that continues from the state of its last call.

    The compiled step reuses the memory of the state that it receives, so each call must receive the
    state of the previous call. Images are random and the same at every step. The learning rate is
    so low that values stay in the range of training.
    """
    experiment = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, image_size=image_size),
        model=dataclasses.replace(recipe.model, dtype="float32"),
        batch=dataclasses.replace(recipe.batch, size=batch, micro=micro, loop="auto"),
        optim=dataclasses.replace(recipe.optim, learning_rate=1e-3, warmup_epochs=0.0),
    ).experiment()
    program = experiment.compile(jax.devices()[:1])
    shape = experiment.data.element_spec["image"].shape
    arrays = program.partition.place_batch(random_batch((batch, *shape)))
    state = program.init(recipe.seed)

    def step() -> Any:
        nonlocal state
        state, metrics = program.train(state, arrays)
        return state, metrics

    return step


def random_batch(shape: Shape) -> dict[str, np.ndarray]:
    """Makes normally distributed images, and labels of the ten classes all datasets have."""
    (images,) = timing.normal_arrays(shape)
    return {"image": images, "label": np.arange(shape[0], dtype=np.int32) % 10}


def step_rows(seconds: Times) -> list[dict[str, Any]]:
    """Returns a row for each call, and for the time that weight standardization adds to BCN's step.

    Each has a ratio to BatchNorm's step. If timed, there are also ratios to BCN+WS's step, to
    weight standardization alone, and to PyTorch's step in both memory formats; the faster counts.
    """
    times = {name: each for (name, _), each in seconds.items()}
    references = {"batchnorm": times["bn"]}
    references |= {name: each for name, each in times.items() if name.startswith("torch")}
    if "ws_alone" in times:
        times["ws_added"] = times["bcn_ws"] - times["bcn"]
        references |= {name: times[name] for name in ("bcn_ws", "ws_alone")}
    return [{"norm": name, **figures(each, **references)} for name, each in times.items()]
