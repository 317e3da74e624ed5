"""The compiler's figures of a step, and their ratios to BatchNorm's."""

import json

import pytest

from experiments import bench
from experiments._ahead_of_time import Compiled
from experiments._bench.memory import memory_rows

pytestmark = pytest.mark.usefixtures("tiny_network")


def compiled(**figures):
    defaults = dict.fromkeys(Compiled._fields, 1)
    return Compiled(**{**defaults, **figures})


def test_ratios_are_to_bn_of_the_same_micro_batch():
    results = {
        (1, "bcn"): compiled(temp_bytes=30),
        (1, "bn"): compiled(temp_bytes=10),
        (2, "bcn"): compiled(temp_bytes=30),
    }
    rows = memory_rows(results)
    assert [row["temp_ratio_to_bn"] for row in rows] == [3, 1, None]


def test_memory_writes_its_rows(tmp_path, capsys):
    path = tmp_path / "memory.json"
    arguments = ["--quick", "--norms", "bn", "gn_ws", "--micro-batches", "2", "--compact"]
    assert bench.main(["memory", *arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    kinds = ("temp", "argument", "peak", "total")
    keys = {"micro_batch", "norm"} | {f"{kind}_bytes" for kind in kinds}
    assert [set(row) for row in rows] == [keys | {f"{kind}_ratio_to_bn" for kind in kinds}] * 2
    assert [(row["micro_batch"], row["norm"]) for row in rows] == [(2, "bn"), (2, "gn_ws")]
    for row in rows:
        assert row["total_bytes"] >= row["temp_bytes"] + row["argument_bytes"] > 0
    # Parameters and momentum outweigh two images.
    assert rows[1]["argument_ratio_to_bn"] == pytest.approx(1, abs=0.05)
    printed = " ".join(capsys.readouterr().out.split())
    assert "digits_resnet8" in printed
    assert "for the CPU, compact" in printed
