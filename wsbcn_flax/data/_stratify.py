"""A seeded stratified split that stays the same for good."""

import numpy as np


def stratified_split(
    labels: np.ndarray, *, test_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits samples into train and test with the same share of every class.

    Each class gives ``test_size * (share of the class)`` samples to the test split, rounded down,
    and the classes with the largest remainders (the lowest label first among equals) give one more
    until ``test_size`` is reached.

    Args:
        labels: int ``[N]``.
        test_size: exact number of test samples, in ``[1, N - 1]``.
        seed: chooses which samples of a class are taken.

    Returns:
        ``(train, test)``: sorted int64 indices into ``labels``, which together hold every sample
        once.

    Raises:
        ValueError: if ``test_size`` leaves one of the splits empty.

    Example:
        >>> import numpy as np
        >>> train, test = stratified_split(np.array([0, 0, 0, 0, 1, 1]), test_size=3, seed=0)
        >>> len(train), len(test)
        (3, 3)
    """
    total = len(labels)
    if not 0 < test_size < total:
        raise ValueError(
            f"test_size must leave both splits a sample: 1 to {total - 1}, got {test_size}"
        )
    classes, counts = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(counts * test_size, total)
    largest_first = np.argsort(-remainders, kind="stable")
    quotas[largest_first[: test_size - quotas.sum()]] += 1

    # numpy freezes the stream of RandomState for good; default_rng's may change with a release.
    rng = np.random.RandomState(seed)
    is_test = np.zeros(total, bool)
    for label, quota in zip(classes, quotas, strict=True):
        members = np.flatnonzero(labels == label)
        is_test[rng.permutation(members)[:quota]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)
