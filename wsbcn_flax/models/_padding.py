"""Padding of images to a common size, which is left out of all statistics."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from wsbcn_flax.layers import BatchChannelNorm, ChannelNorm
from wsbcn_flax.models._layers import ModuleFactory


@dataclasses.dataclass(frozen=True, eq=False)
class Padding:
    """The padding below and on the right of images; there is none if ``image_hw`` is None.

    A network must zero the padding wherever it may become nonzero before a convolution, such as
    after each normalization. It then computes the same from an image with and without padding.

    Attributes:
        image_hw: Heights and widths [B, 2], in pixels, of the images without padding, or None.
        padded_hw: Height and width of the padded images, in pixels.
    """

    image_hw: jax.Array | None
    padded_hw: tuple[int, int]

    @classmethod
    def of(cls, images: jax.Array, image_hw: jax.Array | None) -> "Padding":
        """Makes the padding of images [B, H, W, C]; raises ValueError if image_hw is not [B, 2]."""
        if image_hw is not None and image_hw.shape != (len(images), 2):
            raise ValueError(
                f"image_hw must be a height and a width for each image, [{len(images)}, 2], "
                f"received {image_hw.shape}."
            )
        return cls(image_hw, (images.shape[1], images.shape[2]))

    def mask(self, x: jax.Array) -> jax.Array | None:
        """Returns which positions [B, H, W, 1] of features [B, H, W, C] belong to the image.

        Raises:
            ValueError: If the features' size does not divide the size of the padded images.
        """
        if self.image_hw is None:
            return None
        size = (x.shape[1], x.shape[2])
        if any(padded % n for padded, n in zip(self.padded_hw, size, strict=True)):
            raise ValueError(
                "Padded images must be a multiple of the strides high and wide, received "
                f"{self.padded_hw} with features of {size}. Pad them to a multiple of 32."
            )
        strides = (self.padded_hw[0] // size[0], self.padded_hw[1] // size[1])
        return valid_positions(self.image_hw, size, strides)[..., None]

    def fill(self, x: jax.Array, value: float = 0.0) -> jax.Array:
        """Returns the features with ``value`` in the padding."""
        mask = self.mask(x)
        return x if mask is None else jnp.where(mask, x, value)

    def leave_out_of(self, norm: ModuleFactory) -> ModuleFactory:
        """Wraps a normalization to leave padding out of its statistics and zero in its output."""
        if self.image_hw is None:
            return norm

        @functools.wraps(norm)
        def make(*args: Any, **options: Any) -> Any:
            layer: Any = norm(*args, **options)

            def apply(x: jax.Array) -> jax.Array:
                mask: Any = self.mask(x)
                # Flax's normalizations need a mask for every channel.
                own = isinstance(layer, BatchChannelNorm | ChannelNorm)
                y = layer(x, mask=mask if own else jnp.broadcast_to(mask, x.shape))
                return jnp.where(mask, y, 0)

            return apply

        return make


def valid_positions(
    image_hw: jax.Array, size: tuple[int, int], strides: tuple[int, int]
) -> jax.Array:
    """Returns which positions [B, *size] of features with these strides belong to the image.

    ``image_hw`` holds the heights and widths [B, 2] of the images in pixels.
    """
    height, width = -(-image_hw[:, 0] // strides[0]), -(-image_hw[:, 1] // strides[1])
    rows = jnp.arange(size[0])[None] < height[:, None]
    columns = jnp.arange(size[1])[None] < width[:, None]
    return rows[:, :, None] & columns[:, None, :]


def repeat_edges(x: jax.Array, image_hw: jax.Array, stride: int) -> jax.Array:
    """Repeats the last row and column of each image once into the padding of x [B, H, W, C].

    Interpolation beyond the last position then gives the same as at the border of an array, where
    the last position is used twice.
    """
    for axis in (1, 2):
        size = -(-image_hw[:, axis - 1] // stride)
        is_next = jnp.arange(x.shape[axis])[None] == size[:, None]
        is_next = jnp.expand_dims(is_next, (3 - axis, 3))
        x = jnp.where(is_next, jnp.roll(x, 1, axis), x)
    return x
