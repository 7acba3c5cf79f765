"""Every Python block of the README and every example of a public docstring runs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import perfvl.nn
from perfvl import stackgan_data, stackgan_images
from perfvl.models import caffenet, caffenet_parts, fitnet, stackgan, stackgan_parts, stackgan_step
from perfvl.ops import (
    activation,
    color_transform,
    conditioning,
    gan_loss,
    info_nce,
    key_queue,
    momentum_update,
    norm_act,
    pooling,
    separable_conv,
    small_loss,
    upsample_conv,
)

ROOT = Path(__file__).resolve().parent.parent


def test_readme_code_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    losses = []
    for block in blocks:
        exec(block, namespace)
        losses.append(namespace["loss"].item())  # type: ignore[attr-defined]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        activation,
        caffenet,
        caffenet_parts,
        color_transform,
        conditioning,
        fitnet,
        gan_loss,
        info_nce,
        key_queue,
        momentum_update,
        norm_act,
        pooling,
        separable_conv,
        small_loss,
        stackgan,
        stackgan_data,
        stackgan_images,
        stackgan_parts,
        stackgan_step,
        upsample_conv,
        perfvl.nn.color_transform,
        importlib.import_module("perfvl.nn.activation"),  # in the package, the name is that of a function
        perfvl.nn.activation_names,
        perfvl.nn.conditioning,
        perfvl.nn.info_nce,
        perfvl.nn.key_queue,
        perfvl.nn.lsuv,
        perfvl.nn.momentum_update,
        perfvl.nn.pooling,
        perfvl.nn.separable_conv,
        perfvl.nn.small_loss,
        perfvl.nn.upsample_conv,
    ],
    ids=lambda m: m.__name__,
)
def test_docstring_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
