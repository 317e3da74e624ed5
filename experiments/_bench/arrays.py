"""Random arrays, the same in every run."""

import numpy as np

Shape = tuple[int, int, int, int]


def normal_arrays(generator: np.random.Generator, *shapes: Shape) -> list[np.ndarray]:
    """Float32 arrays of the shapes, of a normal distribution."""
    return [generator.standard_normal(shape, np.float32) for shape in shapes]
