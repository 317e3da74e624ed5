"""The modes of flax.nnx in which every layer must work."""

import flax
import pytest

# graph mode or tree mode, and whether a graph may change.
MODES = {"graph": (True, True), "simple_graph": (True, False), "tree": (False, False)}


@pytest.fixture(params=MODES)
def nnx_mode(request):
    """Runs a test in each mode of flax.nnx."""
    before = flax.config.nnx_graph_mode, flax.config.nnx_graph_updates
    set_mode(*MODES[request.param])
    yield request.param
    set_mode(*before)


def set_mode(graph_mode, graph_updates):
    flax.config.update("nnx_graph_mode", graph_mode)
    flax.config.update("nnx_graph_updates", graph_updates)
