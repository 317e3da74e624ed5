"""Datasets prepared once for all tests of a run."""

import pytest

from wsbcn_flax.data import load_split


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory):
    """A data_dir in which the packaged datasets are prepared; tests must not write to it."""
    data_dir = tmp_path_factory.mktemp("prepared")
    for name in ("mnist5k", "digits"):
        load_split(name, "train", data_dir=data_dir)
    return data_dir
