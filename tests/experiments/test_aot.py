"""Compiling a recipe's step ahead of time for chips that are not here."""

import importlib.metadata
import json

import pytest

from experiments import aot
from experiments._ahead_of_time import count_collectives, tpu_devices

HLO = """
  %all-reduce.1 = (f32[8]{0}, f32[4]{0}) all-reduce(f32[8]{0} %a, f32[4]{0} %b), channel_id=1
  %start = f32[8]{0} all-reduce-start(f32[8]{0} %c), channel_id=2
  %done = f32[8]{0} all-reduce-done(f32[8]{0} %start)
  ROOT %gather = f32[64]{0} all-gather(f32[8]{0} %done), dimensions={0}
  %fusion = f32[8]{0} fusion(f32[8]{0} %all-reduce.1), calls=%not-a-all-reduce
"""


def test_counts_each_collective_once():
    assert count_collectives(HLO) == {"all-reduce": 2, "all-gather": 1}


@pytest.mark.parametrize("installed", [None, "0.0.17"])
def test_needs_the_libtpu_that_jax_was_made_for(installed, monkeypatch):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        ImportError, match=rf"libtpu==.* found {installed or 'none'}: .*\[tpu-aot\]"
    ):
        tpu_devices("v5e:2x4")


libtpu = pytest.mark.skipif(
    not any(d.metadata["Name"] == "libtpu" for d in importlib.metadata.distributions()),
    reason="compiling for TPU needs the extra tpu-aot",
)


@libtpu
def test_compiles_a_step_with_one_all_reduce(tmp_path, capsys):
    """Synced batch normalization has one for every layer, forward and backward."""
    out = tmp_path / "aot.json"
    arguments = ["digits_resnet8_bcn_ws", "--topology", "v5e:2x4", "--per-device-batch", "2"]
    assert aot.main([*arguments, "--json", str(out), "--against", "bn_synced"]) == 0
    results = json.loads(out.read_text())
    assert list(results) == ["bcn_ws", "bn_synced"]
    for result in results.values():
        assert result["chips"] == 8
        assert min(result["bytes_accessed"], result["temp_bytes"], result["argument_bytes"]) > 0
    assert results["bcn_ws"]["collectives"] == {"all-reduce": 1}
    assert results["bn_synced"]["all_reduces"] > 9
    assert "bn_synced" in capsys.readouterr().out


@libtpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:3x99"], "must be one that libtpu knows"),
        (["--against", "batchnorm"], "A normalization is one of bn, gn"),
        (["--micro", "2"], "whole number of micro-batches"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert aot.main(["digits_resnet8_bcn_ws", *arguments]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
