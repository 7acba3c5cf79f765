"""What the kernels that write in place have to give, in numpy: for those of the CPU and of CUDA alike.

`kernels` is a module of bindings, or anything with their `momentum_update` and `key_queue`.
"""

from __future__ import annotations

import numpy as np

from native.floats import BFLOAT16, DTYPES, FLOAT32, narrow, same, widen

RNG = np.random.default_rng


def some(*shape: int) -> np.ndarray:
    return RNG(sum(shape)).standard_normal(shape).astype(np.float32)


VIEWS = {
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "every other column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "columns of a wider buffer": lambda x: np.pad(x, ((0, 0), (0, 8)))[:, : x.shape[1]],
    "columns of a buffer of odd width": lambda x: np.pad(x, ((0, 0), (0, 1)))[:, : x.shape[1]],
    "one row for all": lambda x: np.broadcast_to(x[:1], x.shape),
    "every third row": lambda x: np.repeat(x, 3, axis=0)[::3],
}


def ulp(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The distance between neighbours of `dtype` where x is."""
    if dtype == BFLOAT16:
        return np.spacing(x.astype(np.float32)).astype(np.float64) * 2.0**16
    return np.spacing(x.astype(dtype)).astype(np.float64)


def operands(target: str, source: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    return narrow(some(n), DTYPES[target]), narrow(2 * some(n + 1)[1:], DTYPES[source])


def check_momentum_update(
    kernels, target: np.ndarray, source: np.ndarray, copy=None, m: float = 0.99, **options
) -> None:
    t, s = widen(target).astype(np.float64), widen(source).astype(np.float64)
    copies = [np.zeros(target.shape, copy)] if copy else []
    kernels.momentum_update([target], [source], copies, momentum=m, **options)
    allowed = ulp(np.maximum(np.abs(t), np.abs(s)), target.dtype)
    assert (np.abs(widen(target) - (m * t + (1 - m) * s)) <= allowed).all()
    assert not copies or same(copies[0], narrow(widen(target), copy))


class Ring:
    """A ring that the kernel writes, and its twin that is written one row at a time."""

    def __init__(self, size: int, dim: int, dtype: np.dtype = FLOAT32, *, cursor: int = 0, view=lambda x: x, widths=()):
        start = narrow(10 * some(size, dim), dtype)
        self.size, self.dtype = size, dtype
        self.keys, self.twin = view(start.copy()), view(start.copy())
        self.cursor, self.valid = np.array([cursor]), np.array([0])
        self.twin_cursor, self.twin_valid = cursor % size, 0
        self.payloads = [RNG(w).integers(0, 255, (size, w), np.uint8) for w in widths]
        self.twin_payloads = [p.copy() for p in self.payloads]

    def enqueue(self, kernels, keys: np.ndarray, mask=None, *, normalize=False, drop_tail=False, **shifts) -> Ring:
        widths = [p.shape[1] for p in self.payloads]
        payloads = [RNG(w + len(keys)).integers(0, 255, (len(keys), w), np.uint8) for w in widths]
        kernels.key_queue(
            self.keys,
            self.cursor,
            keys,
            valid=self.valid,
            mask=mask,
            payload_rings=self.payloads,
            payloads=payloads,
            normalize=normalize,
            drop_tail=drop_tail,
            **shifts,
        )
        kept = np.flatnonzero(np.ones(len(keys), bool) if mask is None else mask)
        rows = widen(keys).astype(np.float64)
        if normalize:
            with np.errstate(invalid="ignore"):
                rows /= np.maximum(np.sqrt((rows**2).sum(1, keepdims=True)), 1e-12)
        for i, row in enumerate(kept):
            to = self.twin_cursor + i
            if drop_tail and to >= self.size:
                continue
            self.twin[to % self.size] = narrow(rows[row], self.dtype)
            for ring, values in zip(self.twin_payloads, payloads, strict=True):
                ring[to % self.size] = values[row]
        reached = self.twin_cursor + len(kept)
        self.twin_cursor = 0 if drop_tail and reached >= self.size else reached % self.size
        self.twin_valid = min(self.size, self.twin_valid + len(kept))
        return self

    def check(self, tolerance: float = 0.0) -> None:
        # The whole buffers: nothing may be written between the elements of a view.
        mine, twin = (x if x.base is None else x.base for x in (self.keys, self.twin))
        if tolerance:
            assert np.allclose(widen(mine), widen(twin), rtol=tolerance, atol=1e-30, equal_nan=True)
        else:
            assert same(mine, twin)
        assert (self.cursor[0], self.valid[0]) == (self.twin_cursor, self.twin_valid)
        for ring, expected in zip(self.payloads, self.twin_payloads, strict=True):
            assert (ring == expected).all()
