"""NewsNet and its pooled word vectors: equal to the eager pool, from a table that follows the embedding."""

from __future__ import annotations

import copy
import doctest
import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perfvl.models.noisy_label_news
from perfvl.models.noisy_label import NewsNet, PooledEmbedding

KNOWN = json.loads((Path(__file__).parent / "data" / "small_loss_around.json").read_text())["networks"]


def plainly(weight: Tensor, words: Tensor, pooled: int) -> Tensor:
    return F.adaptive_avg_pool1d(F.embedding(words, weight).flatten(1), pooled)


def test_newsnet_windows_are_the_known_ones():
    known = KNOWN["newsnet_pool"]
    # Every entry of every word is its own flat position, so a window's mean is its middle.
    weight = torch.arange(float(known["in"]), dtype=torch.float64).view(1000, 300)
    means = PooledEmbedding(weight)(torch.arange(1000)[None])[0]
    for (start, end), mean in zip(known["first_windows"], means, strict=False):
        assert mean == pytest.approx((start + end - 1) / 2)
    assert len(means) == known["out"]
    torch.testing.assert_close(means, plainly(weight, torch.arange(1000)[None], known["out"])[0])


# words, dim, pooled: one word in many windows, one window over many words, both, neither; the last three take the plain
# way, since their pattern is too long for a table.
SIZES = [
    (1000, 300, 4800),
    (1000, 50, 4800),
    (12, 30, 20),
    (9, 40, 21),
    (5, 50, 7),
    (4, 16, 13),
    (8, 10, 8),
    (4, 9, 36),
    (3, 4, 12),
    (6, 50, 1),
    (15, 50, 7),
    (1, 7, 3),
    (10, 6, 4),
    (7, 5, 3),
    (3, 2, 11),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_pooled_words_are_the_eager_pool(sizes):
    words, dim, pooled = sizes
    weight = torch.randn(23, dim, dtype=torch.float64)
    numbers = torch.randint(23, (3, words))
    truth = plainly(weight, numbers, pooled)
    torch.testing.assert_close(PooledEmbedding(weight, words=words, pooled=pooled)(numbers), truth, rtol=0, atol=1e-14)
    pool = PooledEmbedding(weight.float(), words=words, pooled=pooled)
    single = pool(numbers)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), truth, rtol=0, atol=1e-6)
    assert (pool._table is None) == (sizes in SIZES[-3:])


def test_pooled_words_keep_no_word_vectors_of_a_batch():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    pool = PooledEmbedding(torch.randn(23, 300))
    numbers = torch.randint(23, (16, 1000))
    pool(numbers)
    with Largest() as largest:
        pool(numbers)
    assert largest.numel == 16 * 1000 * 6


@pytest.mark.parametrize(
    "change",
    [
        lambda pool, new: pool.load_state_dict({"weight": new}),
        lambda pool, new: pool.load_state_dict({"weight": new}, assign=True),
        lambda pool, new: pool.weight.copy_(new),
        lambda pool, new: pool.weight[3].zero_(),
        lambda pool, new: setattr(pool.weight, "data", new),
        lambda pool, new: setattr(pool, "weight", nn.Parameter(new, requires_grad=False)),
        lambda pool, new: pool.double(),
    ],
    ids=["load", "assign", "copy", "edit", "data", "replace", "cast"],
)
def test_the_table_follows_the_embedding(change):
    pool = PooledEmbedding(torch.randn(23, 30), words=12, pooled=20)
    numbers = torch.randint(23, (4, 12))
    pool(numbers)
    change(pool, torch.randn(23, 30))
    after = pool(numbers)
    assert after.dtype == pool.weight.dtype
    torch.testing.assert_close(after, plainly(pool.weight, numbers, 20))


def test_the_table_is_built_once():
    pool = PooledEmbedding(torch.randn(23, 30), words=12, pooled=20)
    pool(torch.randint(23, (4, 12)))
    table = pool._table
    pool.eval()
    pool(torch.randint(23, (2, 12)))
    assert pool._table is table


def test_a_freed_embedding_is_not_taken_for_a_new_one_in_its_place():
    pool = PooledEmbedding(torch.randn(500, 300))
    numbers = torch.randint(500, (1, 1000))
    for _ in range(5):
        pool.weight = nn.Parameter(torch.randn(500, 300), requires_grad=False)
        torch.testing.assert_close(pool(numbers), plainly(pool.weight, numbers, 4800))


def test_the_table_is_no_part_of_state_copies_or_files():
    pool = PooledEmbedding(torch.randn(23, 30), words=12, pooled=20)
    numbers = torch.randint(23, (4, 12))
    expected = pool(numbers)
    assert list(pool.state_dict()) == ["weight"]
    twin = copy.deepcopy(pool)
    assert twin._table is None
    assert torch.equal(twin(numbers), expected)
    file = io.BytesIO()
    torch.save(pool, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded._table is None
    assert torch.equal(loaded(numbers), expected)


def test_pooling_works_in_inference_mode_and_after_it():
    weight = torch.randn(23, 30)
    numbers = torch.randint(23, (4, 12))
    expected = plainly(weight, numbers, 20)
    pool = PooledEmbedding(weight, words=12, pooled=20)
    with torch.inference_mode():
        torch.testing.assert_close(pool(numbers), expected)
        made_here = PooledEmbedding(torch.zeros(23, 30), words=12, pooled=20)
        made_here(numbers)
        made_here.weight.copy_(weight)
        torch.testing.assert_close(made_here(numbers), expected)
    nn.Linear(20, 2)(pool(numbers)).sum().backward()
    weight.zero_()  # shared with the pool
    assert (pool(numbers) == 0).all()


def test_pooling_takes_int32_no_text_and_strided_words():
    pool = PooledEmbedding(torch.randn(23, 30), words=12, pooled=20)
    numbers = torch.randint(23, (12, 4)).T
    assert torch.equal(pool(numbers.int()), pool(numbers))
    assert torch.equal(pool(numbers.contiguous()), pool(numbers))
    assert pool(numbers[:0]).shape == (0, 20)


def test_pooling_stays_in_full_precision_under_autocast():
    pool = PooledEmbedding(torch.randn(23, 30), words=12, pooled=20)
    numbers = torch.randint(23, (4, 12))
    expected = pool(numbers)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool(numbers), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pools_of_half_precision_words_are_rounded_once(dtype):
    pool = PooledEmbedding(torch.randn(23, 300).to(dtype))
    numbers = torch.randint(23, (4, 1000))
    truth = plainly(pool.weight.double(), numbers, 4800)
    pooled = pool(numbers)
    assert pooled.dtype == dtype
    # Half a unit in the last place; the rest is float32's.
    assert ((pooled.double() - truth).abs() <= truth.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()


@pytest.mark.parametrize("bad", [-1, 23])
def test_numbers_of_no_word_are_an_error(bad):
    pool = PooledEmbedding(torch.randn(23, 30), words=12, pooled=20)
    with pytest.raises(IndexError):
        pool(torch.full((1, 12), bad))


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: PooledEmbedding(torch.zeros(3, 4, dtype=torch.int64)), TypeError, "embedding"),
        (lambda: PooledEmbedding(torch.zeros(3)), ValueError, "embedding"),
        (lambda: PooledEmbedding((0, 4)), ValueError, "embedding"),
        (lambda: PooledEmbedding((3, 4), words=0), ValueError, "words"),
        (lambda: PooledEmbedding((3, 4), pooled=2.0), TypeError, "pooled"),
        (lambda: PooledEmbedding((3, 4))(torch.zeros(2, 999, dtype=torch.int64)), ValueError, "words"),
        (lambda: PooledEmbedding((3, 4))(torch.zeros(2, 1000)), TypeError, "words"),
    ],
)
def test_pooling_names_what_it_does_not_take(call, error, argument):
    with pytest.raises(error, match=f"PooledEmbedding: `{argument}` got .*, expected"):
        call()


def test_newsnet_is_its_layers_on_frozen_words():
    weight = torch.randn(23, 300)
    model = NewsNet((23, 300))
    model.load_state_dict({**model.state_dict(), "embedding.weight": weight})
    numbers = torch.randint(23, (4, 1000))
    x = plainly(weight, numbers, 4800)
    for linear, norm in ((model.fc1, model.bn1), (model.fc2, model.bn2)):
        x = linear(x)
        x = (x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt()
        x = x / (1 + x.abs())
    logits = model(numbers)
    # Batch-norm of four texts multiplies rounding.
    torch.testing.assert_close(logits, model.fc3(x), rtol=0, atol=1e-4)
    logits.square().sum().backward()
    assert model.embedding.weight.grad is None
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("embedding"))


def test_newsnet_compiles_whole():
    model = NewsNet(torch.randn(23, 300)).eval()
    numbers = torch.randint(23, (2, 1000))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(numbers), model(numbers))


def test_docstring_examples_run():
    result = doctest.testmod(perfvl.models.noisy_label_news)
    assert result.attempted > 0
    assert result.failed == 0
