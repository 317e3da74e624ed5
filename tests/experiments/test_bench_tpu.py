"""The table of steps compiled for TPU."""

import importlib.metadata
import json

import pytest

from experiments import bench
from experiments._ahead_of_time import Compiled
from experiments._bench.tpu import AheadOfTime, tpu_rows

pytestmark = pytest.mark.usefixtures("tiny_network")
libtpu = pytest.mark.skipif(
    not any(d.metadata["Name"] == "libtpu" for d in importlib.metadata.distributions()),
    reason="compiling for TPU needs the extra tpu-aot",
)
RATIOS = {
    f"{kind}_ratio_to_{reference}"
    for kind in ("bytes", "temp", "peak")
    for reference in ("bn", "bn_barrier")
}


def test_ratios_are_to_each_reference_that_is_compiled():
    figures = dict.fromkeys(Compiled._fields, 1)
    results = {
        (2, "bn"): Compiled(**{**figures, "bytes_accessed": 4.0}),
        (2, "bcn_ws"): Compiled(**{**figures, "bytes_accessed": 3.0}),
    }
    row = tpu_rows(AheadOfTime(), results)[1]
    assert row["bytes_ratio_to_bn"] == 0.75
    assert row["bytes_ratio_to_bn_barrier"] is None


@libtpu
def test_aot_writes_its_rows(tmp_path, capsys):
    path = tmp_path / "aot.json"
    options = ["--quick", "--topology", "v5e:2x2", "--per-device-batch", "1", "--against", "bn"]
    assert bench.main(["aot", *options, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [row["norm"] for row in rows] == ["bn", "bcn_ws"]
    own = {"topology", "per_device_batch", "norm", *Compiled._fields, *RATIOS}
    assert all(set(row) == own for row in rows)
    assert all(row["chips"] == 4 and row["bytes_accessed"] > 0 for row in rows)
    assert rows[0]["bytes_ratio_to_bn"] == 1
    assert "Ratios" in capsys.readouterr().out


@libtpu
def test_an_unknown_topology_is_an_error_in_one_line(capsys):
    assert bench.main(["aot", "--topology", "v5e:3x99"]) == 1
    assert "must be one that libtpu knows" in capsys.readouterr().err.splitlines()[-1]
