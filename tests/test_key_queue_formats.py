"""Checkpoints of key queues of other systems: what is read, what is written, what is refused."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

from perfvl.nn import KeyQueue, dump_queues, key_queue_ddp, key_queue_formats, load_queues

SIZE, DIM, CURSOR = 12, 5, 7


def keys_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def paired(image: str, text: str, *pointers: str, ids: bool = False) -> dict[str, torch.Tensor]:
    state = {image: keys_of(1, DIM, SIZE), text: keys_of(2, DIM, SIZE)}
    state |= {name: torch.tensor([CURSOR]) for name in pointers}
    return state | ({"idx_queue": torch.arange(SIZE)[None]} if ids else {})


# What each system's state_dict holds, written down from the buffers it registers.
CHECKPOINTS = {
    "moco": ("moco", {"module.queue": keys_of(0, DIM, SIZE), "module.queue_ptr": torch.tensor([CURSOR])}),
    "brivl": ("brivl", paired("img_queue", "text_queue", "img_queue_ptr", "text_queue_ptr")),
    "albef": ("albef", paired("image_queue", "text_queue", "queue_ptr")),
    "albef retrieval": ("albef", paired("image_queue", "text_queue", "queue_ptr", ids=True)),
    "lavis": ("lavis", paired("image_queue", "text_queue", "queue_ptr")),
    "lavis retrieval": ("lavis", paired("image_queue", "text_queue", "queue_ptr", ids=True)),
    "blip": ("blip", paired("image_queue", "text_queue", "queue_ptr")),
    "blip retrieval": ("blip", paired("image_queue", "text_queue", "ptr_queue", ids=True)),
    "solo-learn": ("solo-learn", {"queue": keys_of(3, 2, DIM, SIZE), "queue_ptr": torch.tensor([CURSOR])}),
    "lightly": ("lightly", {"bank": keys_of(4, SIZE, DIM), "bank_ptr": torch.tensor([CURSOR])}),
    "pytorch-metric-learning": (
        "pytorch-metric-learning",
        {"embedding_memory": keys_of(5, SIZE, DIM), "label_memory": torch.arange(SIZE) % 3},
    ),
}
POINTERS = [(case, name) for case, (_, state) in CHECKPOINTS.items() for name in state if "ptr" in name]


def load(system: str, state: dict[str, torch.Tensor], **options) -> dict[str, KeyQueue]:
    if system == "pytorch-metric-learning":
        options = {"cursor": CURSOR, "valid": SIZE, **options}
    return load_queues(state, system, **options)


def keys_in(system: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> keys [K, d], by hand."""
    if system == "moco":
        return {"keys": state["module.queue"].T}
    if system == "solo-learn":
        return {"view1": state["queue"][0].T, "view2": state["queue"][1].T}
    if system == "lightly":
        return {"keys": state["bank"]}
    if system == "pytorch-metric-learning":
        return {"keys": state["embedding_memory"]}
    image = "img_queue" if system == "brivl" else "image_queue"
    return {"image": state[image].T, "text": state["text_queue"].T}


def without(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if key != name}


# Reading


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_every_row_every_id_and_the_pointer_arrive(case):
    system, state = CHECKPOINTS[case]
    queues, expected = load(system, state), keys_in(system, state)
    assert list(queues) == list(expected)
    for name, queue in queues.items():
        assert torch.equal(queue.keys, expected[name])
        assert queue.keys.is_contiguous()
        assert (int(queue.cursor), int(queue.valid)) == (CURSOR, SIZE)
        payloads = {n: queue.payloads[n].tolist() for n in queue.payloads}
        if "idx_queue" in state:
            assert payloads == {"ids": list(range(SIZE))}
        elif "label_memory" in state:
            assert payloads == {"labels": (torch.arange(SIZE) % 3).tolist()}
        else:
            assert payloads == {}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_round_trip_gives_the_same_names_shapes_dtypes_and_values(case):
    system, state = CHECKPOINTS[case]
    exported = dump_queues(load(system, state), system)
    assert set(exported) == set(state)
    for name, value in state.items():
        assert exported[name].dtype == value.dtype
        assert exported[name].is_contiguous()
        assert torch.equal(exported[name], value), name


@pytest.mark.parametrize("case", CHECKPOINTS)
@pytest.mark.parametrize("prefix", ["", "module.", "criterion.memory_bank."])
def test_the_prefix_of_a_wrapped_model_is_found_among_its_weights(case, prefix):
    system, state = CHECKPOINTS[case]
    bare = {name.removeprefix("module."): value for name, value in state.items()}
    weights = {f"{prefix}encoder.weight": torch.ones(2), "head.bias": torch.ones(3), "epoch": 3}
    queues = load(system, {**weights, **{prefix + name: value for name, value in bare.items()}})
    for queue, plain in zip(queues.values(), load(system, state).values(), strict=True):
        assert torch.equal(queue.keys, plain.keys)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_resumed_queue_continues_where_the_checkpoint_stopped(case):
    system, state = CHECKPOINTS[case]
    keys = torch.ones(7, DIM)
    for queue in load(system, state).values():
        before = queue.keys.clone()
        queue.enqueue(keys, **{name: torch.full((7,), 99) for name in queue.payloads})
        written = [(CURSOR + i) % SIZE for i in range(7)]
        assert torch.equal(queue.keys[written], keys)
        kept = [i for i in range(SIZE) if i not in written]
        assert torch.equal(queue.keys[kept], before[kept])
        assert int(queue.cursor) == (CURSOR + 7) % SIZE
        for name in queue.payloads:
            assert (queue.payloads[name] == 99).tolist() == [i in written for i in range(SIZE)]


def test_settings_reach_the_queues():
    system, state = CHECKPOINTS["albef"]
    for queue in load_queues(state, system, dtype=torch.bfloat16, normalize=True, strict="drop_tail").values():
        assert queue.keys.dtype == torch.bfloat16
        assert queue.normalize
        assert queue.strict == "drop_tail"
    for queue in load_queues(state, system).values():
        assert queue.keys.dtype == torch.float32


def test_the_dtype_of_a_half_precision_memory_is_kept():
    _, state = CHECKPOINTS["pytorch-metric-learning"]
    half = {**state, "embedding_memory": state["embedding_memory"].half()}
    queues = load("pytorch-metric-learning", half)
    assert queues["keys"].keys.dtype == torch.float16
    assert dump_queues(queues, "pytorch-metric-learning")["embedding_memory"].dtype == torch.float16


def test_a_checkpoint_is_not_written_to():
    system, state = CHECKPOINTS["lightly"]
    before = {name: value.clone() for name, value in state.items()}
    load_queues(state, system)["keys"].enqueue(torch.ones(4, DIM))
    assert all(torch.equal(state[name], value) for name, value in before.items())


@pytest.mark.parametrize("system", ["brivl", "moco"])
def test_rows_that_hold_no_keys_can_be_told(system):
    queues = load_queues(CHECKPOINTS[system][1], system, valid=CURSOR)
    assert {int(queue.valid) for queue in queues.values()} == {CURSOR}


def test_a_model_takes_over_the_state_of_a_loaded_queue():
    model = nn.ModuleDict({"queue": KeyQueue(SIZE, DIM, dtype=torch.bfloat16)})
    system, state = CHECKPOINTS["moco"]
    model["queue"].load_state_dict(load_queues(state, system)["keys"].state_dict())
    assert torch.equal(model["queue"].keys, state["module.queue"].T.bfloat16())
    with pytest.raises(ValueError, match=rf"`keys` got shape \({SIZE}, {DIM}\), expected \({SIZE}, 6\)"):
        KeyQueue(SIZE, 6).load_state_dict(load_queues(state, system)["keys"].state_dict())


def test_both_pointer_names_of_blip_are_read_and_each_is_written_where_blip_has_it():
    ids = paired("image_queue", "text_queue", "queue_ptr", ids=True)  # as LAVIS saves BLIP's retrieval model
    queues = load_queues(ids, "blip")
    assert int(queues["image"].cursor) == CURSOR
    assert set(dump_queues(queues, "blip")) == {"image_queue", "text_queue", "ptr_queue", "idx_queue"}
    assert set(dump_queues(queues, "lavis")) == {"image_queue", "text_queue", "queue_ptr", "idx_queue"}


def test_a_queue_moves_from_one_system_to_another():
    queues = load(*CHECKPOINTS["brivl"])
    exported = dump_queues(queues, "albef")
    assert torch.equal(exported["image_queue"], CHECKPOINTS["brivl"][1]["img_queue"])
    assert int(exported["queue_ptr"]) == CURSOR


def test_pytorch_metric_learning_itself_reads_what_is_written():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.CrossBatchMemory(losses.NTXentLoss(), DIM, memory_size=SIZE)
    batches = [(keys_of(i, 5, DIM), torch.arange(5) % 2) for i in range(3)]
    for embeddings, labels in batches:
        theirs(embeddings, labels)
    queue = load_queues(
        theirs.state_dict(),
        "pytorch-metric-learning",
        cursor=theirs.queue_idx,
        valid=SIZE if theirs.has_been_filled else theirs.queue_idx,
    )["keys"]
    other = losses.CrossBatchMemory(losses.NTXentLoss(), DIM, memory_size=SIZE)
    other.load_state_dict(dump_queues({"keys": queue}, "pytorch-metric-learning"))
    other.queue_idx, other.has_been_filled = int(queue.cursor), int(queue.valid) == SIZE
    embeddings, labels = keys_of(9, 5, DIM), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(theirs(embeddings, labels), other(embeddings, labels))
    queue.enqueue(embeddings, labels=labels)
    assert torch.equal(queue.keys, theirs.embedding_memory)
    assert torch.equal(queue.payloads["labels"], theirs.label_memory)


# What is not read


@pytest.mark.parametrize(("case", "pointer"), POINTERS)
@pytest.mark.parametrize("value", [SIZE, SIZE + 100, -1])
def test_a_pointer_outside_of_the_queue_is_refused(case, pointer, value):
    system, state = CHECKPOINTS[case]
    message = rf"load_queues: `{pointer}` got {value}, expected a number in \[0, {SIZE - 1}\]"
    with pytest.raises(ValueError, match=message):
        load(system, {**state, pointer: torch.tensor([value])})


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case, (_, state) in CHECKPOINTS.items() for name in state if name != "idx_queue"],
)
def test_a_missing_entry_is_named_beside_what_was_found(case, name):
    system, state = CHECKPOINTS[case]
    rest = without(state, name)
    with pytest.raises(ValueError, match="load_queues: `state_dict` got") as error:
        load(system, {"encoder.weight": torch.ones(1), **rest})
    got, expected = str(error.value).split("expected")
    assert got.split("got ")[1].strip(", ").split(", ") == list(rest)
    assert name.removeprefix("module.") in expected


def test_a_checkpoint_without_queues_shows_its_first_names():
    with pytest.raises(ValueError, match=r"got w0, w1, .*, w7 and 2 more, expected queue, queue_ptr \(moco\)"):
        load_queues({f"w{i}": torch.ones(1) for i in range(10)}, "moco")
    with pytest.raises(ValueError, match="got nothing, expected"):
        load_queues({}, "moco")


def test_names_that_only_end_alike_are_not_a_prefix():
    _, state = CHECKPOINTS["brivl"]
    with pytest.raises(ValueError, match="got img_queue, img_queue_ptr, expected queue, queue_ptr"):
        load_queues({name: value for name, value in state.items() if "img" in name}, "moco")


def test_two_models_in_one_checkpoint_are_not_guessed_between():
    _, state = CHECKPOINTS["lightly"]
    twice = {f"{prefix}.{name}": value for prefix in "ab" for name, value in state.items()}
    with pytest.raises(ValueError, match=r"got a\.bank and b\.bank, expected one bank"):
        load_queues(twice, "lightly")


@pytest.mark.parametrize(
    ("case", "name", "value", "error", "message"),
    [
        ("moco", "module.queue", torch.zeros(DIM), ValueError, r"`module.queue` got shape \(5,\), expected \(d, K\)"),
        ("moco", "module.queue", torch.zeros(2, DIM, SIZE), ValueError, r"got shape \(2, 5, 12\), expected \(d, K\)"),
        ("moco", "module.queue", torch.zeros(DIM, 0), ValueError, r"got shape \(5, 0\), expected \(d, K\)"),
        ("moco", "module.queue", torch.zeros(DIM, SIZE).long(), TypeError, "`module.queue` got torch.int64"),
        ("moco", "module.queue", [1.0], TypeError, "`module.queue` got list, expected a torch.Tensor"),
        ("moco", "module.queue_ptr", torch.zeros(1), TypeError, "`module.queue_ptr` got torch.float32"),
        ("moco", "module.queue_ptr", torch.zeros(2).long(), ValueError, r"got shape \(2,\), expected one element"),
        ("solo-learn", "queue", torch.zeros(DIM, SIZE), ValueError, r"expected \(2, d, K\)"),
        ("solo-learn", "queue", torch.zeros(3, DIM, SIZE), ValueError, r"expected \(2, d, K\)"),
        (
            "brivl",
            "text_queue",
            torch.zeros(DIM + 1, SIZE),
            ValueError,
            r"`text_queue` got shape \(6, 12\), expected the",
        ),
        ("albef", "text_queue", torch.zeros(DIM, SIZE - 1), ValueError, r"the shape of image_queue, \(5, 12\)"),
        ("blip retrieval", "idx_queue", torch.zeros(SIZE).long(), ValueError, r"got shape \(12,\), expected \(1, 12\)"),
        ("blip retrieval", "idx_queue", torch.zeros(1, SIZE), TypeError, "`idx_queue` got torch.float32"),
        ("pytorch-metric-learning", "label_memory", torch.zeros(3).long(), ValueError, r"expected \(12,\)"),
    ],
)
def test_entries_of_other_shapes_or_dtypes_are_refused(case, name, value, error, message):
    system, state = CHECKPOINTS[case]
    with pytest.raises(error, match=message):
        load(system, {**state, name: value})


@pytest.mark.parametrize(
    ("case", "options", "error", "message"),
    [
        ("moco", {"cursor": 3}, ValueError, "`cursor` got 3, expected None: moco saves it as queue_ptr"),
        ("moco", {"valid": SIZE + 1}, ValueError, r"`valid` got 13, expected a number in \[0, 12\]"),
        ("moco", {"valid": 3}, ValueError, "`valid` got 3, expected 12, or 7"),
        ("moco", {"valid": 7.0}, TypeError, "`valid` got float, expected an int"),
        ("pytorch-metric-learning", {"cursor": None}, ValueError, "`cursor` got None, expected a number"),
        ("pytorch-metric-learning", {"valid": None}, ValueError, "`valid` got None, expected a number"),
        ("pytorch-metric-learning", {"cursor": SIZE}, ValueError, r"`cursor` got 12, expected a number in \[0, 11\]"),
    ],
)
def test_a_cursor_or_count_that_does_not_fit_is_refused(case, options, error, message):
    with pytest.raises(error, match=f"load_queues: {message}"):
        load(*CHECKPOINTS[case], **options)


def test_unknown_systems_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="load_queues: `system` got 'simclr', expected one of moco, brivl"):
        load_queues({}, "simclr")
    with pytest.raises(ValueError, match="dump_queues: `system` got 'simclr', expected one of moco, brivl"):
        dump_queues({}, "simclr")
    with pytest.raises(TypeError, match="`state_dict` got list"):
        load_queues([], "moco")  # type: ignore[arg-type]


# Writing


def filled(cursor: int = 0, size: int = SIZE, **settings) -> KeyQueue:
    queue = KeyQueue(size, DIM, init="random", **settings)
    queue.cursor.fill_(cursor)
    return queue


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("system", ["moco", "lightly"])
def test_half_precision_queues_are_written_in_float32_and_come_back_bit_equal(system, dtype):
    queue = filled(5, dtype=dtype)
    exported = dump_queues({"keys": queue}, system)
    assert {value.dtype for value in exported.values()} == {torch.float32, torch.int64}
    back = load_queues(exported, system, dtype=dtype)["keys"]
    assert torch.equal(back.keys, queue.keys)
    assert int(back.cursor) == 5


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_what_is_written_shares_no_memory_with_the_queues(case):
    queues = load(*CHECKPOINTS[case])
    exported = dump_queues(queues, CHECKPOINTS[case][0])
    before = {name: value.clone() for name, value in exported.items()}
    for queue in queues.values():
        queue.enqueue(torch.ones(3, DIM), **{name: torch.full((3,), 77) for name in queue.payloads})
    assert all(torch.equal(exported[name], value) for name, value in before.items())


@pytest.mark.parametrize("case", [case for case in CHECKPOINTS if case != "pytorch-metric-learning"])
def test_a_queue_that_is_not_full_is_refused_where_every_row_counts_as_a_key(case):
    system, state = CHECKPOINTS[case]
    with pytest.raises(ValueError, match=rf"got 7 rows that hold keys, expected 12: {system} takes every row"):
        dump_queues(load(system, state, valid=CURSOR), system)


def test_pytorch_metric_learning_takes_a_memory_that_is_not_full():
    queue = KeyQueue(SIZE, DIM)
    queue.enqueue(torch.ones(4, DIM), labels=torch.full((4,), 2))
    exported = dump_queues({"keys": queue}, "pytorch-metric-learning")
    assert exported["embedding_memory"].sum(1).tolist() == [DIM] * 4 + [0] * 8
    back = load_queues(exported, "pytorch-metric-learning", cursor=4, valid=4)["keys"]
    assert torch.equal(back.payloads["labels"], queue.payloads["labels"])


@pytest.mark.parametrize("system", ["albef", "lavis", "blip", "solo-learn"])
def test_two_cursors_do_not_fit_one_pointer(system):
    names = ("view1", "view2") if system == "solo-learn" else ("image", "text")
    with pytest.raises(
        ValueError, match=f"`{names[1]}` got the cursor 8, expected 3 as in {names[0]}: {system} has one"
    ):
        dump_queues({names[0]: filled(3), names[1]: filled(8)}, system)


def test_two_cursors_fit_the_two_pointers_of_brivl():
    exported = dump_queues({"image": filled(3), "text": filled(8)}, "brivl")
    assert (exported["img_queue_ptr"].tolist(), exported["text_queue_ptr"].tolist()) == ([3], [8])


@pytest.mark.parametrize(
    ("system", "queues", "error", "message"),
    [
        ("moco", {"queue": filled()}, ValueError, r"`queues` got \['queue'\], expected \['keys'\], the queues of moco"),
        ("moco", filled(), TypeError, "`queues` got KeyQueue, expected a mapping"),
        ("brivl", {"image": filled()}, ValueError, r"expected \['image', 'text'\]"),
        ("moco", {"keys": torch.zeros(SIZE, DIM)}, TypeError, "`keys` got Tensor, expected a KeyQueue"),
        ("moco", {"keys": filled(dtype=torch.float64)}, ValueError, "`keys` got float64 keys, expected float32"),
        ("moco", {"keys": filled(payloads={"ids": torch.int64})}, ValueError, "got payloads ids, expected none: moco"),
        ("albef", {"image": filled(payloads={"a": torch.int64}), "text": filled()}, ValueError, "expected ids or none"),
        (
            "albef",
            {"image": filled(payloads={"ids": torch.int64}), "text": filled()},
            ValueError,
            "`text` got payloads none, expected those of image: ids",
        ),
        (
            "albef",
            {k: filled(payloads={"ids": (torch.int64, (2,))}) for k in ("image", "text")},
            ValueError,
            r"`image` got payload ids of shape \(12, 2\) and torch.int64, expected \(12,\)",
        ),
        ("pytorch-metric-learning", {"keys": filled()}, ValueError, "got payloads none, expected labels"),
        (
            "albef",
            {"image": filled(), "text": filled(size=6)},
            ValueError,
            r"`text` got shape \(6, 5\), expected that of",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(system, queues, error, message):
    with pytest.raises(error, match=f"dump_queues: .*{message}"):
        dump_queues(queues, system)


def test_two_lists_of_ids_do_not_fit_one():
    queues = load(*CHECKPOINTS["albef retrieval"])
    queues["text"].payloads["ids"][3] = 50
    with pytest.raises(ValueError, match="`text` got other ids than image, expected equal ones: albef holds one list"):
        dump_queues(queues, "albef")


@pytest.mark.parametrize("module", [key_queue_formats, key_queue_ddp], ids=lambda m: m.__name__)
def test_docstring_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
