"""momentum_update_ under the contract: dtype mixes, layouts, write-out, the convex form."""

from __future__ import annotations

from typing import Any

import torch
from op_contract import BadInput, OpContract, Sample
from torch import Tensor, nn

import perfvl.functional as pf
from perfvl.nn import MomentumEncoder

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def eager(targets, sources, momentum, copies=None, strict=None):
    """What users run on tensors of one dtype, and with casts around it on others."""
    with torch.no_grad():
        for t, s in zip(targets, sources, strict=True):
            if not t.is_floating_point():
                t.copy_(s)
            elif strict == "moco":
                t.copy_(t * momentum + s * (1.0 - momentum))
            else:
                t.lerp_(s.to(t.dtype), float(1 - momentum))
        for t, c in zip(targets, copies or [], strict=bool(copies)):
            c.copy_(t)


def rival(targets, sources, momentum, copies=None, strict=None):
    targets = [t.clone() for t in targets]
    copies = None if copies is None else [c.clone() for c in copies]
    eager(targets, sources, momentum, copies, strict)
    return [*targets, *(copies or [])]


SHAPES = ((3, 5), (1,), (0, 4), (257,), (2, 3, 4, 5), ())


def lists(device: str, target=F32, source=F32, copy=None, shapes=SHAPES) -> dict[str, Any]:
    def tensors(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape).to(device, dtype) for shape in shapes]

    found = {"targets": tensors(target), "sources": tensors(source), "momentum": 0.9}
    return found if copy is None else found | {"copies": tensors(copy)}


def samples(device: str) -> list[Sample]:
    found: list[Sample] = []

    def add(name: str, inputs: dict[str, Any], slack: float = 2e-7, **options: Any) -> None:
        found.append(Sample(name, {**inputs, **options}, rival, slack))

    slack = {F32: 2e-7, BF16: 3e-3, F16: 4e-4}
    for target in (F32, BF16, F16):
        for source in (F32, BF16, F16):
            worst = max(slack[target], slack[source] if target != F32 else 0)
            add(f"{target} follows {source}", lists(device, target, source), worst)
    for copy in (F32, BF16, F16):
        add(f"copies in {copy}", lists(device, copy=copy), slack[copy])
    add("half target, copies", lists(device, BF16, F32, F16), slack[BF16])
    for momentum in (0.0, 0.3, 0.5, 0.99, 0.999, 0.9999, 1.0):
        add(f"momentum {momentum}", lists(device), momentum=momentum)
    add("momentum tensor", lists(device), momentum=torch.tensor(0.7, device=device))
    add("float64 momentum tensor", lists(device), momentum=torch.tensor([0.995], dtype=F64, device=device))
    add("convex form", lists(device), strict="moco", momentum=0.999)
    add("large", lists(device, shapes=((300_001,), (7,), (1000, 1000), (129,))), momentum=0.99)
    integers = [torch.arange(4, device=device), torch.tensor(3, dtype=torch.int32, device=device)]
    mixed = lists(device)
    mixed["targets"] = [*mixed["targets"], *integers]
    mixed["sources"] = [*mixed["sources"], *(2 * t + 1 for t in integers)]
    add("integers are copied", mixed)

    def layout(name: str, make_target: Any, make_source: Any) -> None:
        inputs = lists(device, shapes=((4, 6, 8, 10), (33,)))
        inputs["targets"][0] = make_target(inputs["targets"][0])
        inputs["sources"][0] = make_source(inputs["sources"][0])
        add(name, inputs)

    last = {"memory_format": torch.channels_last}
    layout("both channels_last", lambda t: t.contiguous(**last), lambda t: t.contiguous(**last))
    layout("target channels_last", lambda t: t.contiguous(**last), lambda t: t)
    layout("source channels_last", lambda t: t, lambda t: t.contiguous(**last))
    layout("both transposed", lambda t: t.transpose(0, 3), lambda t: t.transpose(0, 3))
    layout("sliced target", lambda t: torch.cat([t, t], 3)[..., :10], lambda t: t)
    layout("every other element", lambda t: t.repeat_interleave(2, 3)[..., ::2], lambda t: t)
    layout("expanded source", lambda t: t, lambda t: t[:1].expand(4, 6, 8, 10))
    layout("offset by one", lambda t: shifted(t), lambda t: shifted(t))
    return found


def shifted(t: Tensor) -> Tensor:
    """The same values at an address that is not a multiple of a vector."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def raw_samples(device: str) -> list[tuple]:
    found = []
    for target, source, copy in [(F32, F32, None), (F32, BF16, BF16), (F16, F16, F32)]:
        inputs = lists(device, target, source, copy)
        for momentum, tensor in ((0.9, None), (0.0, torch.tensor(0.9, device=device))):
            found.append(
                (inputs["targets"], inputs["sources"], momentum, tensor, inputs.get("copies", []), copy is None)
            )
    return found


def bad_inputs() -> list[BadInput]:
    def bad(name: str, error: type[Exception], message: str, **change: Any) -> BadInput:
        return BadInput(name, base | change, error, f"^momentum_update_: `{message}")

    V, T = ValueError, TypeError
    base = lists("cpu") | {"copies": None}
    good = base["targets"]
    ones = torch.ones(3, 5)
    flat = torch.ones(20)
    return [
        bad("reversed sign", V, r"momentum` got -0.9, expected a number in \[0, 1\]", momentum=-0.9),
        bad("beyond one", V, "momentum` got 1.001, expected", momentum=1.001),
        bad("nan", V, "momentum` got nan, expected", momentum=float("nan")),
        bad("momentum is text", T, "momentum` got str, expected a float", momentum="0.9"),
        bad("momentum is bool", T, "momentum` got bool, expected a float", momentum=True),
        bad("integer momentum tensor", T, "momentum` got torch.int64, expected", momentum=torch.tensor(1)),
        bad("two momentums", V, r"momentum` got shape \(2,\), expected", momentum=torch.tensor([0.9, 0.9])),
        bad("momentum elsewhere", V, "momentum` got device meta, expected the targets' device cpu",
            momentum=torch.tensor(0.9, device="meta")),
        bad("fewer sources", V, "sources` got 5 tensors, expected one for each of the 6 targets", sources=good[:5]),
        bad("fewer copies", V, "copies` got 1 tensors, expected one for each", copies=good[:1]),
        bad("not a tensor", T, r"sources\[1\]` got float, expected a torch.Tensor", sources=[good[0], 1.0, *good[2:]]),
        bad("other shape", V, r"sources\[0\]` got shape \(5, 3\), expected the target's shape \(3, 5\)",
            sources=[good[0].T, *good[1:]]),
        bad("broadcastable", V, r"sources\[0\]` got shape \(1, 5\), expected", sources=[good[0][:1], *good[1:]]),
        bad("elsewhere", V, r"sources\[0\]` got device meta, expected",
            sources=[torch.empty(3, 5, device="meta"), *good[1:]]),
        bad("complex", T, r"sources\[0\]` got torch.complex64, expected a real",
            sources=[torch.ones(3, 5, dtype=torch.complex64), *good[1:]]),
        bad("sparse", T, r"sources\[0\]` got torch.sparse_coo, expected a dense",
            sources=[torch.ones(3, 5).to_sparse(), *good[1:]]),
        bad("integer source", T, r"sources\[0\]` got torch.int64, expected a floating-point",
            sources=[torch.ones(3, 5, dtype=torch.int64), *good[1:]]),
        bad("integer target", T, r"sources\[0\]` got torch.float32, expected the target's dtype torch.int64",
            targets=[torch.ones(3, 5, dtype=torch.int64), *good[1:]]),
        bad("expanded target", V, r"targets\[0\]` got an expanded tensor, expected",
            targets=[torch.ones(1, 5).expand(3, 5), *good[1:]]),
        bad("tied to two sources", V, "targets` got tensors that share memory, expected",
            targets=[ones, ones], sources=[torch.zeros(3, 5), torch.full((3, 5), 2.0)]),
        bad("overlapping targets", V, "targets` got tensors that share memory, expected",
            targets=[flat[:15], flat[5:]], sources=[torch.zeros(15), torch.zeros(15)]),
        bad("overlapping copies", V, "copies` got tensors that share memory, expected",
            targets=[torch.zeros(15), torch.zeros(15)], sources=[torch.ones(15), torch.ones(15)],
            copies=[flat[:15], flat[5:]]),
        bad("unknown form", V, "strict` got 'timm', expected None or \"moco\"", strict="timm"),
    ]  # fmt: skip


class Pair(nn.Module):
    """A module and its momentum encoder, as a training checkpoint holds them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
        self.slow = MomentumEncoder(self.online, 0.9, **options)
        with torch.no_grad():
            for tensor in (*self.online.parameters(), self.online[1].running_mean):
                tensor.add_(torch.randn_like(tensor))


def call_pair(module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    module.slow.update()
    return module.slow(torch.ones(4, 5, device=inputs["targets"][0].device, dtype=module.slow.compute_dtype or F32))


def small(device: str, rows: int = 4) -> dict[str, Any]:
    return lists(device, copy=F32, shapes=((rows, 16), (16,), (3, 3)))


MOMENTUM_UPDATE = OpContract(
    name="momentum_update_",
    call=pf.momentum_update_,
    samples=samples,
    raw_op=torch.ops.perfvl.momentum_update_.default,
    raw_samples=raw_samples,
    small=small,
    bad_inputs=bad_inputs(),
    resize=lambda inputs: small(inputs["targets"][0].device.type, rows=6),
    empty=lambda inputs: {k: [t[:0] for t in v] if isinstance(v, list) else v for k, v in inputs.items()},
    cuda="native",
    mutates=("targets", "copies"),
    modules=lambda: [Pair(), Pair(buffers="average"), Pair(compute_dtype=BF16)],
    call_module=call_pair,
)
