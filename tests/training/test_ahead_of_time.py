import importlib.metadata
import math

import jax
import jax.numpy as jnp
import pytest

from wsbcn_flax.training.ahead_of_time import (
    count_collectives,
    device_bytes,
    estimated_operations,
    gpu_devices,
    gpu_kernels,
    group_by_module,
    largest_that_fits,
    tpu_devices,
)

HLO = """
  %all-reduce.1 = (f32[8]{0}, f32[4]{0}) all-reduce(f32[8]{0} %a, f32[4]{0} %b), channel_id=1
  %start = f32[8]{0} all-reduce-start(f32[8]{0} %c), channel_id=2
  %done = f32[8]{0} all-reduce-done(f32[8]{0} %start)
  ROOT %gather = f32[64]{0} all-gather(f32[8]{0} %done), dimensions={0}
  %fusion = f32[8]{0} fusion(f32[8]{0} %all-reduce.1), calls=%not-a-all-reduce
"""


def test_counts_each_collective_once():
    assert count_collectives(HLO) == {"all-reduce": 2, "all-gather": 1}


PROGRAM = """
%fused (a: f32[8]) -> f32[8] {
  ROOT %add = f32[8]{0} add(%a, %a), backend_config={"estimated_cycles":"7"}
}

%body.1 (b: f32[8]) -> f32[8] {
  ROOT %twice = f32[8]{0} fusion(%b), calls=%fused, metadata={op_name="jit(step)/while/body/\
jvp(Net)/block1/norm2/add" stack_frame_id=3}, backend_config={"estimated_cycles":"2000"}
}

ENTRY %main.2_spmd (c: f32[8]) -> f32[8] {
  %c = bf16[1000,3072]{1,0:T(8,128)(2,1)} parameter(0)
  %loop = f32[8]{0} while(%c), condition=%enough, body=%body.1
  %kernel.1 = (f32[8]{0:T(128)}, f32[]) custom-call(%c, %loop), custom_call_target="tpu_custom_call"
  %kernel.2 = f32[8]{0} custom-call(%loop), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/transpose(jvp(Net))/block10/norm1/jvp(Net)/block10/norm1/dot"}
  %moved = f32[8]{0} custom-call(%loop), custom_call_target="ConcatBitcast"

  ROOT %last = f32[8]{0} fusion(%loop), backend_config={"estimated_cycles":"100000"}
}
""".replace("\\\n", "")


def test_operations_are_those_that_run_and_those_of_loops_as_often_as_they_run():
    """Operations inside a fusion, and custom calls that compute nothing, are not counted."""
    found = estimated_operations(PROGRAM, trips=3, bytes_per_cycle=1000)
    bytes_moved = 2 * 1000 * 3072 + 4 * 8 + 4 * 8 + 4
    assert [(o.cycles, o.times, o.is_custom_call) for o in found] == [
        (2000, 3, False),
        (math.ceil(bytes_moved / 1000), 1, True),
        (3000, 1, True),
        (100000, 1, False),
    ]


def test_modules_that_differ_by_numbers_are_one_group():
    found = estimated_operations(PROGRAM, trips=3, bytes_per_cycle=1000)
    groups = {group.path: group for group in group_by_module(found)}
    forward, backward = "forward while/body/Net/block*/norm*", "backward Net/block*/norm*"
    assert groups[forward] == (forward, 6000, 3, 3)
    assert groups[backward] == (backward, 3000, 1, 0)
    assert next(iter(groups)) == "(no module)"


def test_a_gpus_kernels_are_counted_with_what_they_move():
    program = """
%sliced (whole: bf16[8], part: f32[99]) -> (f32[2], f32[2]) {
  %whole = bf16[8]{0} parameter(0)
  %part = f32[99]{0} parameter(1)
  %some = bf16[2]{0} slice(%whole), slice={[0:2]}
  %all = f32[8]{0} convert(%whole)
  %two = f32[2]{0} slice(%part), slice={[7:9]}
  ROOT %sums = (f32[2]{0}, f32[2]{0}) tuple(%two, %two)
}

ENTRY %main (a: bf16[8], b: f32[99]) -> bf16[8] {
  %a = bf16[8]{0} parameter(0)
  %b = f32[99]{0} parameter(1)
  %sums = (f32[2]{0}, f32[2]{0}) fusion(%a, %b), kind=kInput, calls=%sliced
  %sum = f32[2]{0} get-tuple-element(%sums), index=0
  %conv = (bf16[8]{0}, u8[0]{0}) custom-call(%a, %sum), custom_call_target="__cudnn$convForward"
  %start = f32[2]{0} all-reduce-start(%sum), channel_id=1
  ROOT %done = f32[2]{0} all-reduce-done(%start)
}
"""
    assert gpu_kernels(program) == (16 + (16 + 8) + (16 + 16 + 8) + (8 + 8), 1, 1)


def test_a_gpu_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match=r"one of a100, h100, received 'p100'"):
        gpu_devices("p100")


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


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 48, 49, 1000])
def test_bisection_finds_what_trying_all_finds(limit):
    sizes = [48, 1, 2, 3, 4, 6, 8, 12, 16, 24]
    fit = largest_that_fits(sizes, lambda size: size, limit=limit)
    assert fit.size == max(size for size in sizes if size <= limit)
    # Compilations are slow, so few sizes are tried; the answer must be one of them.
    assert len(fit.tried) <= 5
    assert fit.tried[fit.size] <= limit


def test_nothing_that_fits_is_an_error_that_says_what_the_least_needs():
    with pytest.raises(ValueError, match=r"limit of 99 bytes, received \[1, 2\], .* 1: 100"):
        largest_that_fits([2, 1], lambda size: 100 * size, limit=99)
    with pytest.raises(ValueError, match=r"received \[\]"):
        largest_that_fits([], lambda size: size, limit=1)


@pytest.mark.parametrize("donated", [False, True])
def test_an_output_in_place_of_a_donated_argument_counts_once(donated):
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    double = jax.jit(lambda x: 2 * x, donate_argnums=0 if donated else ())
    megabytes = device_bytes(double.lower(x).compile()) / 2**20
    assert megabytes == pytest.approx(1 if donated else 2, abs=0.1)
