"""NewsNet, and its pooled word vectors without the word vectors of a batch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PooledEmbedding(nn.Module):
    r"""Word vectors of a text, laid end to end and averaged to `pooled` numbers:
    :math:`\text{AdaptiveAvgPool1d}_P(\text{flatten}(E_{w_1}, \dots, E_{w_L}))`.

    Replaces ``F.adaptive_avg_pool1d(embedding(words).detach().flatten(1), pooled)`` (Co-teaching+, arXiv:1901.04215,
    released code, NEWS) without its [B, L, D] intermediate. The embedding is frozen, so what a word adds to the windows
    is computed once. The windows lie on the words in a pattern that repeats after :math:`L / \gcd(L, P)` words, the
    phases (1000 words of 300 and 4800 windows: 5 words of 24 windows), and a word lies on few windows, its pieces (at
    most 6). A table [vocab, phases, pieces] holds what a word adds to each; a batch gathers [B, L, pieces] of it, and
    adds the pieces of the windows that lie on more than one word. Where the table would be larger than the embedding,
    and under ``torch.compile``, the plain way is taken.

    Args:
        embedding: floating [vocab, dim], finite, shared and not copied; or (vocab, dim) for the shape alone: zeros, to
            be filled by ``load_state_dict``.
        words: L, the words of a text.
        pooled: P, the windows.

    State: ``weight`` [vocab, dim], a parameter that requires no gradient (DistributedDataParallel would send a buffer
    at every step). The table is no part of the state. It is built at the first call after ``weight`` was replaced,
    moved, cast, loaded or edited in place; only an edit through ``weight.data`` goes unseen.

    Shapes: words int64 or int32 [B, L] in [0, vocab) -> [B, P] in the dtype of ``weight``, without gradient. Sums
    within a word are float64, those across words at least float32, under autocast too.

    Raises:
        TypeError, ValueError: an argument that is not as said above.

    Cost: a batch gathers B L pieces numbers in place of B L D. The table takes 2 vocab D phases pieces FLOP and holds
    vocab phases pieces numbers, a tenth of the embedding at the default sizes.

    Example:
        >>> import torch
        >>> pool = PooledEmbedding(torch.randn(50, 12), words=10, pooled=8)
        >>> words = torch.randint(50, (2, 10))
        >>> plain = torch.nn.functional.adaptive_avg_pool1d(pool.weight[words].flatten(1), 8)
        >>> torch.allclose(pool(words), plain, atol=1e-6)
        True
    """

    def __init__(self, embedding: Tensor | tuple[int, int], *, words: int = 1000, pooled: int = 4800) -> None:
        super().__init__()
        for argument, value in (("words", words), ("pooled", pooled)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"PooledEmbedding: `{argument}` got {type(value).__name__}, expected an int")
            if value < 1:
                raise ValueError(f"PooledEmbedding: `{argument}` got {value}, expected at least 1")
        weight = embedding.detach() if isinstance(embedding, Tensor) else torch.zeros(embedding)
        if not weight.is_floating_point():
            raise TypeError(f"PooledEmbedding: `embedding` got {weight.dtype}, expected a floating-point tensor")
        if weight.dim() != 2 or weight.numel() == 0:
            raise ValueError(f"PooledEmbedding: `embedding` got shape {tuple(weight.shape)}, expected [vocab, dim]")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.words = words
        self.pooled = pooled
        self._period = _period(words, pooled)
        self._table: _Table | None = None

    @torch.no_grad()
    def forward(self, words: Tensor) -> Tensor:
        """words [B, L] -> [B, P]."""
        if words.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"PooledEmbedding: `words` got {words.dtype}, expected int64 or int32")
        if words.dim() != 2 or words.shape[1] != self.words:
            raise ValueError(f"PooledEmbedding: `words` got shape {tuple(words.shape)}, expected [B, {self.words}]")
        phases, pieces, _ = self._period
        # Whether a table is still right cannot be seen while a graph is traced, nor of an inference tensor at all.
        blind = torch.compiler.is_compiling() or self.weight.is_inference()
        if blind or phases * pieces > self.weight.shape[1]:
            return F.adaptive_avg_pool1d(F.embedding(words, self.weight).flatten(1), self.pooled)
        table = self._current_table()
        phase = torch.arange(self.words, device=words.device, dtype=words.dtype) % phases
        parts = F.embedding(words * phases + phase, table.parts)
        with torch.autocast(words.device.type, enabled=False):
            pooled = parts.view(-1, phases * pieces) @ table.assembly
        return pooled.view(len(words), self.pooled).to(self.weight.dtype)

    def _current_table(self) -> _Table:
        weight, table = self.weight, self._table
        if table is None or not table.describes(weight):
            share, assembly = _period_matrices(self.words, self.pooled, weight.shape[1])
            share = share.to(weight.device).flatten(0, 1).T
            # By parts: a float64 copy of the whole embedding may not fit.
            dtype = torch.promote_types(weight.dtype, torch.float32)
            parts = torch.cat([(rows.double() @ share).to(dtype) for rows in weight.split(16384)])
            parts = parts.view(-1, self._period.pieces)
            # A second reference to the memory of `weight`, so that no other tensor can get its address.
            table = _Table(parts, assembly.to(weight.device, dtype), weight.detach(), weight._version)
            self._table = table
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, words={self.words}, pooled={self.pooled}"


class NewsNet(nn.Module):
    r"""The text network of Co-teaching+: pooled word vectors, then
    :math:`W_3\, \phi(W_2\, \phi(W_1 x))` with :math:`\phi = \text{Softsign} \circ \text{BN}` (Co-teaching+,
    arXiv:1901.04215, released code).

    4800-1200-300-K. The embedding is frozen, see :class:`PooledEmbedding`.

    Args:
        embedding: floating [vocab, dim], or (vocab, dim) to be filled by ``load_state_dict``.
        num_classes: K; 20 Newsgroups in 7 groups in the paper.
        words, pooled: as in :class:`PooledEmbedding`.

    Shapes: words int64 or int32 [B, L] -> logits [B, K]. Batch-norm needs B > 1 in training.

    Raises:
        TypeError, ValueError: as in :class:`PooledEmbedding`.

    Example:
        >>> import torch
        >>> model = NewsNet(torch.randn(50, 300))
        >>> model(torch.randint(50, (2, 1000))).shape
        torch.Size([2, 7])
    """

    def __init__(
        self, embedding: Tensor | tuple[int, int], num_classes: int = 7, *, words: int = 1000, pooled: int = 4800
    ) -> None:
        super().__init__()
        self.embedding = PooledEmbedding(embedding, words=words, pooled=pooled)
        self.fc1 = nn.Linear(pooled, 1200)
        self.bn1 = nn.BatchNorm1d(1200)
        self.fc2 = nn.Linear(1200, 300)
        self.bn2 = nn.BatchNorm1d(300)
        self.fc3 = nn.Linear(300, num_classes)

    def forward(self, words: Tensor) -> Tensor:
        """words [B, L] -> logits [B, num_classes]."""
        x = F.softsign(self.bn1(self.fc1(self.embedding(words))))
        return self.fc3(F.softsign(self.bn2(self.fc2(x))))


class _Table(NamedTuple):
    parts: Tensor  # [vocab * phases, pieces]
    assembly: Tensor  # [phases * pieces, windows], 1 where a piece is part of a window
    weight: Tensor
    version: int

    def describes(self, weight: Tensor) -> bool:
        mine = (self.weight.data_ptr(), self.weight.shape, self.weight.stride(), self.weight.dtype, self.weight.device)
        its = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device)
        return mine == its and self.version == weight._version


class _Period(NamedTuple):
    phases: int  # words
    pieces: int  # windows that a word may lie on
    windows: int


def _period(words: int, pooled: int) -> _Period:
    """Window j covers [floor(j S), ceil((j + 1) S)) of the flat text, S = words dim / pooled, so word i lies on windows
    floor(i pooled / words) to ceil((i + 1) pooled / words) - 1. Both repeat where j S is the start of a word."""
    common = math.gcd(words, pooled)
    phases, windows = words // common, pooled // common
    return _Period(phases, max(-(-(i + 1) * windows // phases) - i * windows // phases for i in range(phases)), windows)


def _period_matrices(words: int, pooled: int, dim: int) -> tuple[Tensor, Tensor]:
    """What an entry of a word adds to a piece, float64 [phases, pieces, dim], and which piece goes to which window."""
    phases, pieces, windows = _period(words, pooled)
    share = torch.zeros(phases, pieces, dim, dtype=torch.float64)
    assembly = torch.zeros(phases, pieces, windows, dtype=torch.float64)
    for i in range(phases):
        first = i * windows // phases
        for j in range(first, -(-(i + 1) * windows // phases)):
            start, end = j * phases * dim // windows, -(-(j + 1) * phases * dim // windows)
            share[i, j - first, max(start - i * dim, 0) : end - i * dim] = 1 / (end - start)
            assembly[i, j - first, j] = 1
    return share, assembly.flatten(0, 1)
