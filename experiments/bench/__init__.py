"""Measures layers, steps, input pipelines and detectors' operations, as ratios side by side.

    python -m experiments.bench layers --json runs/layers.json --against torch
    python -m experiments.bench ws --json runs/ws.json
    python -m experiments.bench step --json runs/step.json --against torch
    python -m experiments.bench data --json runs/data.json
    python -m experiments.bench detection --json runs/detection.json --against torch

Every form runs once per round, in an order that changes. A ratio is the median over rounds of the
ratio of two times in the same round. A form's spread is the interquartile range of its times
divided by their median. Measure on a quiet machine, and trust no difference that is small beside
the spread. Other work slows PyTorch most: with both of two cores busy, its ResNet-50 step took 30
times as long, ours twice. `python -m experiments.aot` prints memory and time as the compiler
estimates them.
"""
