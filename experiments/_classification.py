"""The recipes of classification, and the experiments that they make."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments._image_data import ImageData, ImageFacts, published_facts
from experiments._models import make_model, make_transform
from experiments._recipe import DataConfig, ModelConfig, Recipe, from_json
from wsbcn_flax.data import DecodeImage
from wsbcn_flax.data._decoding import resize
from wsbcn_flax.tasks import Classification
from wsbcn_flax.training import Experiment, Partition

_LUMINANCE = np.array([0.299, 0.587, 0.114])  # Weights of red, green and blue in ITU-R BT.601.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(Recipe):
    """A run of image classification.

    Attributes:
        data: Dataset.
        model: Network.
        label_smoothing: Probability spread over all classes in the training loss.
    """

    has_error: ClassVar[bool] = True

    data: DataConfig
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    label_smoothing: float = 0.0

    def load_data(self) -> ImageData:
        """Loads both splits of the dataset, so that errors appear before the first step.

        Raises:
            DatasetNotFoundError: If it is not on this machine; says how to obtain it.
            ValueError: If the batch exceeds the training set.
        """
        data = ImageData(self.data)
        if self.batch.size > len(data.train_split):
            raise ValueError(
                "The batch must not exceed the training set, received a batch of "
                f"{self.batch.size} for {len(data.train_split)} images."
            )
        _ = data.eval_split
        return data

    def data_of_run(self, facts: Mapping[str, Any]) -> ImageData:
        """Returns the data of a run that recorded these facts; loads only what is used."""
        return ImageData(self.data, from_json(ImageFacts, facts))

    def experiment(self, data: ImageData | None = None) -> Experiment:
        """Returns the experiment on ``data``, or with only the dataset's published facts."""
        data = data or ImageData(self.data, published_facts(self.data))
        facts = data.image_facts
        axis_name = Partition(mode=self.batch.mode).axis_name
        model = make_model(self, num_classes=len(facts.class_names), axis_name=axis_name)
        task = Classification(model=model, label_smoothing=self.label_smoothing)
        # The convolutions are the same with any normalization and dtype; this is quick to trace.
        quick = model.clone(norm=nn.LayerNorm, dtype=None)
        transform = make_transform(self.weight, model=quick, image_shape=facts.image_shape)
        return self.assemble(task, data, train_size=facts.train_size, transform=transform)

    def predict_fn(
        self, data: ImageData, variables: Mapping[str, Any]
    ) -> Callable[[jax.Array], jax.Array]:
        """Returns the function from uint8 images [B, H, W, C] to logits [B, K]."""
        facts = data.image_facts
        model = make_model(self, num_classes=len(facts.class_names))
        mean, std = (jnp.asarray(value, jnp.float32) for value in (facts.mean, facts.std))

        def logits(images: jax.Array) -> jax.Array:
            scaled = images.astype(jnp.float32) / 255
            normalized = (scaled - mean[None, None, None]) / std[None, None, None]
            return cast(jax.Array, model.apply(variables, normalized, train=False))

        return logits

    def raw_inputs(self, data: ImageData, batch: Any) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype of ``batch`` images."""
        return jax.ShapeDtypeStruct((batch, *data.image_facts.image_shape), jnp.uint8)

    def read_input(self, path: Path, data: ImageData) -> np.ndarray:
        """Reads an image file as uint8 [H, W, C], cropped as in evaluation or resized.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not an image.
        """
        example: Any = {"image": path.read_bytes(), "file_name": str(path)}
        for transform in data.eval_transforms or (DecodeImage(),):
            example = transform.map(example)
        if data.eval_transforms:
            return example["image"]
        height, width, channels = data.image_facts.image_shape
        image = resize(example["image"], height, width)
        if channels == 1:
            image = np.round(image @ _LUMINANCE).astype(np.uint8)
        return image.reshape(height, width, channels)

    def describe_output(
        self, output: np.ndarray, data: ImageData, *, top: int
    ) -> list[dict[str, str]]:
        """Returns the most probable classes of one image, from its logits."""
        if not np.isfinite(output).all():
            raise ValueError(
                "The model's logits must be finite, received NaN or infinity: the model is damaged "
                "or has diverged; convert or train it again."
            )
        probabilities = np.exp(output - output.max())
        probabilities /= probabilities.sum()
        names = data.image_facts.class_names
        return [
            {"class": names[index], "probability": f"{probabilities[index]:.3f}"}
            for index in np.argsort(-output)[:top]
        ]
