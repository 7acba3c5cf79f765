"""Every function of the contract on what nobody thought of: junk for any argument, any strides, any values.

What is drawn is the same in every run. A function that takes what it is given must do the same as the plain PyTorch
reference; one that does not must say so in a ValueError or TypeError, and leave everything as it was.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import pytest
import torch
from contracts import CONTRACTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_contract import OpContract, evaluate, outputs_of
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import perfvl

every_op = pytest.mark.parametrize("op", CONTRACTS, ids=lambda op: op.name)


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


JUNK: dict[str, Any] = {
    "None": None,
    "text": "x",
    "true": True,
    "zero": 0,
    "minus one": -1,
    "half": 0.5,
    "2^70": 2**70,
    "nan": float("nan"),
    "infinity": float("inf"),
    "complex": 1j,
    "list": [1.0],
    "empty list": [],
    "pair": (1, 2),
    "dict": {},
    "class": Tensor,
    "a number's tensor": torch.ones(()),
    "an empty tensor": torch.ones(0),
    "a row": torch.ones(7),
    "five dimensions": torch.ones(2, 3, 1, 1, 2),
    "integers": torch.ones(4, 4, dtype=torch.int64),
    "bytes": torch.ones(2, 3, 4, 4, dtype=torch.uint8),
    "complex numbers": torch.ones(4, 4, dtype=torch.complex64),
    "sparse": torch.ones(4, 4).to_sparse(),
    "meta": torch.ones(4, 4, device="meta"),
    "a list of tensors": [torch.ones(4, 4)],
    "a list of junk": [None, 3],
}


def tensors_of(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def copies(inputs: dict[str, Any]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors_of(inputs) if t.layout is torch.strided]


@every_op
@fuzz(150)
@given(data=st.data())
def test_junk_is_named(op: OpContract, data):
    parameters = inspect.signature(op.call).parameters.values()
    name = data.draw(st.sampled_from([p.name for p in parameters if p.kind is not p.VAR_KEYWORD]), label="argument")
    kind = data.draw(st.sampled_from(list(JUNK)), label="what")
    inputs = op.small("cpu") | {name: JUNK[kind]}
    before, refusal = copies(inputs), ""
    try:
        op.call(**inputs)
    except (ValueError, TypeError) as error:
        refusal = str(error)
    if refusal and "more than 1 value per channel" not in refusal:  # as torch.nn.functional.batch_norm has it
        assert re.search(r"`[\w.\[\]]+` got .*, expected ", refusal, re.DOTALL), refusal
    if refusal or not op.mutates:
        assert all(torch.equal(a, b) for a, b in zip(before, copies(inputs), strict=True) if a.device.type == "cpu")


def relaid(t: Tensor, data: st.DataObject) -> Tensor:
    """The same numbers in another order of dimensions, with gaps, from some offset on."""
    order = data.draw(st.permutations(range(t.dim())))
    gaps = [data.draw(st.integers(1, 2)) for _ in order]
    offset = data.draw(st.integers(0, 3))
    sizes = [t.shape[d] * gap for d, gap in zip(order, gaps, strict=True)]
    count = 1
    for size in sizes:
        count *= size
    memory = torch.full((count + offset,), 99, dtype=t.dtype)[offset:].view(sizes)
    for axis, gap in enumerate(gaps):
        memory = memory.narrow(axis, 0, t.shape[order[axis]]) if gap == 1 else memory.unfold(axis, 1, gap).squeeze(-1)
    back = sorted(range(t.dim()), key=lambda d: order[d])
    found = memory.permute(back)
    assert found.shape == t.shape
    found.copy_(t.detach())
    return found.requires_grad_(t.requires_grad)


@every_op
@fuzz(40)
@given(data=st.data())
def test_any_strides_give_the_same(op: OpContract, data):
    torch.manual_seed(0)
    inputs = op.small("cpu")
    expected = evaluate(op.function, inputs)
    other = tree_map_only(Tensor, lambda t: relaid(t, data) if data.draw(st.booleans()) else t, inputs)
    found, refusal = {}, ""
    try:
        found = evaluate(op.function, other)
    except ValueError as error:
        refusal = str(error)
    if refusal:  # of what is written in place
        assert op.mutates
        assert re.search(r"contiguous|stride|overlap|dense", refusal), refusal
        return
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        torch.testing.assert_close(found[what], value, rtol=2e-5, atol=2e-5, msg=lambda m, what=what: f"{what}: {m}")


VALUES = {
    "zeros": lambda t: torch.zeros_like(t),
    "tiny": lambda t: t * 1e-38,  # among them subnormal numbers
    "small": lambda t: t * 1e-10,
    "large": lambda t: t * 1e6,
    "huge": lambda t: t * 1e25,
    "equal": lambda t: torch.full_like(t, 0.7),
    "nan": lambda t: poked(t, float("nan")),
    "infinity": lambda t: poked(t, float("inf")),
    "minus infinity": lambda t: poked(t, float("-inf")),
}


def poked(t: Tensor, value: float) -> Tensor:
    found = t.detach().clone()
    found[tuple(int(torch.randint(n, ())) for n in t.shape)] = value
    return found


@every_op
@fuzz(60)
@given(data=st.data())
def test_any_values_go_through(op: OpContract, data):
    """What PyTorch finds finite is finite here, its NaN are NaN here; of finite inputs the answer is the same."""
    torch.manual_seed(data.draw(st.integers(0, 9), label="seed"))
    kinds: list[str] = []

    def other(name: str, t: Tensor) -> Tensor:
        # Of weights that are not finite PyTorch's convolutions make 0 or NaN in the padding, as the algorithm has it.
        wild = list(VALUES)[: -3 if "weight" in name else None]
        kind = data.draw(st.sampled_from(["as it is", *wild]), label=name)
        setting = t.numel() == 1 or name == "uniform"  # of which the ops ask more than any float
        if kind == "as it is" or setting or not t.is_floating_point():
            return t
        kinds.append(kind)
        return VALUES[kind](t.detach()).to(t.dtype).requires_grad_(t.requires_grad)

    inputs = {k: tree_map_only(Tensor, functools.partial(other, k), v) for k, v in op.small("cpu").items()}
    before = copies(inputs)
    found = outputs_of(op.function(**inputs))
    with perfvl.use_backend("reference"):
        expected = outputs_of(op.function(**inputs))
    assert len(found) == len(expected)
    for i, (ours, plain) in enumerate(zip(found, expected, strict=True)):
        assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
        if not ours.is_floating_point():
            continue
        infinite = {"infinity", "minus infinity"} & set(kinds)
        overflows = infinite or "huge" in kinds
        if not (overflows and op.name == "upsample_conv2d"):  # which subtracts, as Winograd's algorithms do
            assert ours[plain.isfinite()].isfinite().all(), f"output {i} of {kinds}"
        if not overflows:  # whose sums of one order are a NaN of another
            assert ours[plain.isnan()].isnan().all(), f"output {i} of {kinds}"
        if not overflows and not {"nan", "large"} & set(kinds):  # "large" is of roundings too, where terms cancel
            scale = float(plain.nan_to_num().abs().max()) if plain.numel() else 0.0
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3 * max(scale, 1.0), equal_nan=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, copies(inputs), strict=True))
