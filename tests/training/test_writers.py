import contextlib
import json
import math
import random
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import full_disk

from wsbcn_flax.training.writers import (
    JsonlWriter,
    MultiWriter,
    TensorBoardWriter,
    read_json,
    read_jsonl,
    write_json,
)


def metrics_of(step: int) -> dict[str, float]:
    return {"loss": 1 / (step + 1), "lr": 0.1 * 0.9**step, "error": math.nan if step == 3 else 0.5}


def write_steps(path, steps, *, resume_step=None) -> None:
    with contextlib.closing(JsonlWriter(path, resume_step=resume_step)) as writer:
        for step in steps:
            writer.write(step, metrics_of(step))


def test_values_come_back_exactly(tmp_path):
    path = tmp_path / "runs" / "a" / "metrics.jsonl"
    values = {"pi": math.pi, "tiny": 5e-324, "half": np.float32(1 / 3), "array": jnp.float32(0.1)}
    with contextlib.closing(JsonlWriter(path)) as writer:
        writer.write(jnp.int32(7), values | {"count": 12, "é": 1})
    assert read_jsonl(path) == [
        {"step": 7, "pi": math.pi, "tiny": 5e-324, "half": float(np.float32(1 / 3))}
        | {"array": float(np.float32(0.1)), "count": 12.0, "é": 1.0}
    ]


def test_values_that_json_lacks_are_still_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": jnp.float32(jnp.nan)}
    with contextlib.closing(JsonlWriter(path)) as writer:
        writer.write(1, values)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": "NaN",
    }  # fmt: skip
    (record,) = read_jsonl(path)
    assert repr(record) == "{'step': 1, 'a': nan, 'b': inf, 'c': -inf, 'd': nan}"


def test_every_write_is_in_the_file_at_once(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in range(3):
        writer.write(step, {"loss": 1.0})
        assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [
            *range(step + 1)
        ]
    writer.close()


@pytest.mark.parametrize("resume_step", [-1, 0, 4, 5, 9])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, resume_step):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write_steps(whole, range(10))
    write_steps(resumed, range(7))
    write_steps(resumed, range(7, 9), resume_step=6)
    write_steps(resumed, range(resume_step + 1, 10), resume_step=resume_step)
    start = min(resume_step + 1, 9)
    expected = whole.read_text().splitlines()
    if resume_step == 9:  # The file ends before the step from which it is resumed.
        expected = expected[:start]
    assert resumed.read_text().splitlines() == expected
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_without_resume_step_records_are_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    write_steps(path, [3, 2])
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 3, 2]


def test_a_line_cut_off_anywhere_by_a_kill_does_no_harm(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write_steps(whole, range(4))
    lines = whole.read_text().splitlines(keepends=True)
    for length in range(len(lines[3])):
        cut.write_text("".join(lines[:3]) + lines[3][:length])
        complete = length == len(lines[3]) - 1  # Only the newline is missing.
        assert len(read_jsonl(cut)) == 3 + complete
        write_steps(cut, range(3 + complete, 4), resume_step=3)
        assert cut.read_text() == whole.read_text()
        cut.write_text("".join(lines[:3]) + lines[3][:length])
        write_steps(cut, range(3, 4), resume_step=2)
        assert cut.read_text() == whole.read_text()


def test_bytes_that_are_no_text_at_the_end_do_no_harm(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(2))
    sound = path.read_bytes()
    path.write_bytes(sound + random.Random(0).randbytes(50).replace(b"\n", b"") + bytes(10))
    write_steps(path, [])
    assert path.read_bytes() == sound


@pytest.mark.parametrize(
    "line", ['{"loss": 1}', "[1]", "2", '{"step": "x"}', '{"step"', "", "null"]
)
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = '{"step": 1}\n' + line + '\n{"step": 2}\n'
    path.write_text(content)
    for use in (read_jsonl, JsonlWriter):
        with pytest.raises(ValueError, match="line 2, is no record"):
            use(path)
    assert path.read_text() == content


@pytest.mark.parametrize("value", [None, "high", jnp.ones(2), {}])
def test_a_metric_that_is_no_scalar_is_named(tmp_path, value):
    with contextlib.closing(JsonlWriter(tmp_path / "metrics.jsonl")) as writer:
        with pytest.raises(ValueError, match="metric 'loss' must be a scalar"):
            writer.write(1, {"loss": value})
        with pytest.raises(ValueError, match='named "step"'):
            writer.write(1, {"step": 2.0})
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def tensorboard_scalars(directory) -> dict[str, dict[int, float]]:
    """Reads event files in order; a session's start at a step hides records from that step on."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    scalars: dict[str, dict[int, float]] = {}
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:  # A record is length, checksum, event, checksum.
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            if event.session_log.status == event.session_log.START:
                for tag, values in scalars.items():
                    scalars[tag] = {s: value for s, value in values.items() if s < event.step}
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def test_tensorboard_gets_every_scalar_and_hides_what_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboardX")
    for resume_step, steps, loss in [(None, (0, 1, 2, 3, 5), 0.5), (1, (2, 3, 4), 0.25)]:
        writer = TensorBoardWriter(tmp_path / "tensorboard", resume_step=resume_step)
        for step in steps:
            writer.write(step, {"train/loss": loss, "lr": jnp.float32(step)})
        writer.close()
    assert tensorboard_scalars(tmp_path / "tensorboard") == {
        "train/loss": {0: 0.5, 1: 0.5, 2: 0.25, 3: 0.25, 4: 0.25},
        "lr": {step: step for step in range(5)},
    }


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'wsbcn_flax\[tensorboard\]'"):
        TensorBoardWriter(tmp_path)


def test_many_writers_get_the_same_and_all_are_closed(tmp_path):
    class Failing:
        closed = False

        def write(self, step, metrics):
            pass

        def close(self):
            self.closed = True
            raise OSError("disk")

    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files = [JsonlWriter(path) for path in paths]
    writer = MultiWriter(files[0], Failing(), files[1])
    writer.write(1, {"loss": 2.0})
    with pytest.raises(OSError, match="disk"):
        writer.close()
    assert [read_jsonl(path) for path in paths] == [[{"step": 1, "loss": 2.0}]] * 2
    for file in files:
        with pytest.raises(ValueError, match="closed file"):
            file.write(2, {})


def test_a_full_disk_is_named_and_costs_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"loss": 1.0})
    with full_disk(40):
        with pytest.raises(OSError, match=rf"File too large: '{path}'"):
            writer.write(2, {"loss": 1.0})
        writer.close()
        with pytest.raises(OSError, match=r"File too large: '.*data.json.tmp'"):
            write_json(tmp_path / "data.json", {"classes": ["a"] * 20})
    assert read_jsonl(path) == [{"step": 1, "loss": 1.0}]
    assert not (tmp_path / "data.json").exists()


@pytest.mark.parametrize(
    "content", [b"", b'{"norm": {"kin', b"\xff\xfe\x00", b'[{"norm": 1}]', b"null"]
)
def test_a_damaged_document_is_named(tmp_path, content):
    path = tmp_path / "recipe.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} must hold a JSON object; it is damaged: .+"):
        read_json(path)
    write_json(path, {"norm": "bcn"})
    assert read_json(path) == {"norm": "bcn"}
