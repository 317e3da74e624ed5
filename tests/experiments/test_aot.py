"""Ahead-of-time compilation of a recipe's step, for chips that are absent and for this CPU."""

import importlib.metadata
import json
import re

import pytest

from experiments import aot
from wsbcn_flax.training.ahead_of_time import Compiled

pytestmark = pytest.mark.usefixtures("tiny_network")
libtpu = pytest.mark.skipif(
    not any(d.metadata["Name"] == "libtpu" for d in importlib.metadata.distributions()),
    reason="compiling for TPU needs the extra tpu-aot",
)
RECIPE = "digits_resnet8_bcn_ws"
CPU = [RECIPE, "--platform", "cpu", "--dtype", "float32"]


def test_ratios_are_to_each_reference_that_is_compiled():
    figures = dict.fromkeys(Compiled._fields, 3_000_000)
    results = {
        "bn": {**figures, "bytes_accessed": 4.0},
        "bcn_ws": {**figures, "bytes_accessed": 3.0},
    }
    row = aot.rows_with_ratios(results)[1]
    assert row["bytes_accessed/bn"] == 0.75
    assert row["small_operations/bn"] == 1
    assert not any(key.endswith("/bn_barrier") for key in row)


def test_compiles_for_the_cpu_at_several_sizes(tmp_path, capsys):
    path = tmp_path / "aot.json"
    options = ["xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"]
    arguments = ["--per-device-batch", "1", "2", "--against", "bn", "--json", str(path)]
    assert aot.main([*CPU, *arguments, "--compiler-options", *options]) == 0
    document = json.loads(path.read_text())
    assert {size: list(rows) for size, rows in document.items()} == {
        "1": ["bn", "bcn_ws"],
        "2": ["bn", "bcn_ws"],
    }
    for row in (row for rows in document.values() for row in rows.values()):
        assert set(row) == set(Compiled._fields) - {"profile"}
        assert row["estimated_ms"] is None
        assert row["total_bytes"] >= row["temp_bytes"] + row["argument_bytes"] > 0
    printed = capsys.readouterr().out
    assert "Ratios" in printed
    assert "batch 2 a chip" in printed


def test_says_what_fits_and_what_it_needs(capsys):
    assert aot.main([*CPU, "--per-device-batch", "2", "--fits", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"micro-batch\s+of 2\s+fits", printed)
    assert aot.main([*CPU, "--per-device-batch", "1", "--fits", "0.00001"]) == 1
    assert "One size at least must fit" in capsys.readouterr().err


@libtpu
def test_compiles_a_step_with_one_all_reduce(tmp_path, capsys):
    """Synced batch normalization has one for every layer, forward and backward."""
    out = tmp_path / "aot.json"
    arguments = [RECIPE, "--topology", "v5e:2x4", "--per-device-batch", "2"]
    arguments += ["--against", "bn_synced", "--profile"]
    assert aot.main([*arguments, "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert list(results) == ["bn_synced", "bcn_ws"]
    for result in results.values():
        assert result["chips"] == 8
        assert min(result["bytes_accessed"], result["temp_bytes"], result["argument_bytes"]) > 0
        assert result["operations"] >= result["small_operations"] > result["custom_calls"]
        assert result["estimated_ms"] > result["small_ms"] > 1e-3 * result["small_operations"]
    assert results["bcn_ws"]["collectives"] == {"all-reduce": 1}
    assert results["bn_synced"]["all_reduces"] > 3
    printed = capsys.readouterr().out
    assert "bn_synced" in printed
    assert "backward ResNet/stage*_block*/norm*" in printed


@libtpu
def test_an_unknown_topology_is_one_line(capsys):
    assert aot.main([RECIPE, "--topology", "v5e:3x99"]) == 1
    assert "must be one that libtpu knows" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "batchnorm"], "The normalization must be one of bn, gn"),
        (["--against", "gn_synced"], "bn_synced or bcn_synced"),
        (["--micro", "2"], "whole number of micro-batches"),
        (["--fits", "1", "--micro", "1"], "goes without --json, --against, --micro"),
        (["--fits", "-1"], "a positive number of GiB"),
        (["--profile"], "needs the estimates of --platform tpu"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert aot.main([*CPU, *arguments]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
