"""The benchmarks of ops that write in place: every contender starts alike, and must end where float64 says."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from benchmark_rows import CPU, check_rows, row_of, rows_of
from perfvl.benchmarks import (
    brivl_step,
    info_nce_peers,
    info_nce_step,
    key_queue,
    key_queue_peers,
    momentum_update,
    momentum_update_peers,
    registry,
)
from perfvl.benchmarks.workload import Unavailable, Workload, imported
from swap_support import require

KINDS = [("float32", None), ("bfloat16", None), ("bfloat16", "bfloat16")]


class TestMomentumUpdate:
    @pytest.mark.parametrize(("source_dtype", "copy_dtype"), KINDS)
    def test_every_contender_gives_the_answer(self, source_dtype: str, copy_dtype: str | None) -> None:
        workload = momentum_update.workload("tiny", 3, 1000, source_dtype=source_dtype, copy_dtype=copy_dtype)
        rows = rows_of(workload)
        refuse = {"foreach lerp", "AveragedModel"} if source_dtype != "float32" else set()
        check_rows(rows, refuse | {"timm ModelEmaV3"})
        for name in refuse:
            assert rows[name]["status"] == "ok" or "refuses bfloat16 sources: " in rows[name]["reason"]

    @pytest.mark.parametrize(("source_dtype", "copy_dtype"), KINDS)
    def test_inputs_are_left_as_they_were(self, source_dtype: str, copy_dtype: str | None) -> None:
        workload = momentum_update.workload("tiny", 3, 100, source_dtype=source_dtype, copy_dtype=copy_dtype)
        inputs = workload.inputs(CPU, seed=0)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        rows_of(dataclasses.replace(workload, make=lambda params, generator: inputs))
        assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())

    @pytest.mark.parametrize("momentum", [0.99, 0.001, 1.0])
    @pytest.mark.parametrize(("source_dtype", "copy_dtype"), KINDS)
    def test_another_momentum_is_a_wrong_answer(
        self, source_dtype: str, copy_dtype: str | None, momentum: float
    ) -> None:
        workload = momentum_update.workload("tiny", 3, 1000, source_dtype=source_dtype, copy_dtype=copy_dtype)
        wrong = momentum_update.then_copied(lambda t, s, _: momentum_update_peers.foreach_mul_add(t, s, momentum))
        assert row_of(workload, momentum_update.contender(wrong, copy_dtype))["match"] is False

    def test_copies_that_are_not_written_are_a_wrong_answer(self) -> None:
        workload = momentum_update.workload("tiny", 3, 1000, source_dtype="bfloat16", copy_dtype="bfloat16")
        forgets = momentum_update.contender(
            lambda targets, sources, copies, m: momentum_update.fused(targets, sources, [], m), "bfloat16"
        )
        row = row_of(workload, forgets)
        assert row["match"] is False
        assert row["error"]["targets"]["relative"] < 1e-6

    def test_the_truth_is_two_steps_of_the_recurrence(self) -> None:
        workload = momentum_update.workload("tiny", 2, 5)
        inputs = workload.inputs(CPU, seed=1)
        target, source = (torch.cat([inputs[f"{kind}{i}"] for i in (0, 1)]).double() for kind in ("target", "source"))
        for _ in range(2):
            target = 0.999 * target + 0.001 * source
        torch.testing.assert_close(workload.truth(inputs)["targets"], target, rtol=1e-12, atol=1e-12)

    def test_the_shapes_are_those_of_resnet50(self) -> None:
        shapes = momentum_update.resnet50_shapes()
        assert len(shapes) == 161
        assert sum(torch.Size(shape).numel() for shape in shapes) == 25_557_032

    def test_the_least_bytes_are_counted_per_element(self) -> None:
        sizes = [momentum_update.workload("tiny", 3, 100, source_dtype=s, copy_dtype=c).bytes for s, c in KINDS]
        assert sizes == [300 * 12, 300 * 10, 300 * 12]

    def test_without_timm_its_row_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        monkeypatch.setitem(sys.modules, "timm.utils", None)
        row = rows_of(momentum_update.workload("tiny", 2, 5))["timm ModelEmaV3"]
        assert (row["status"], row["match"]) == ("unavailable", None)
        assert "needs timm" in row["reason"]


class TestKeyQueue:
    @pytest.mark.parametrize("queue_dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(("normalize", "ids"), [(False, False), (True, False), (False, True)])
    def test_every_contender_gives_the_answer(self, queue_dtype: str, normalize: bool, ids: bool) -> None:
        workload = key_queue.workload(8, 32, 16, queue_dtype=queue_dtype, normalize=normalize, ids=ids)
        rows = rows_of(workload)
        check_rows(rows, {"lightly MemoryBank", "CrossBatchMemory"})
        assert set(rows["perfvl"]["error"]) == ({"keys", "ids"} if ids else {"keys"})

    def test_the_truth_is_a_ring_that_is_written_row_by_row(self) -> None:
        workload = key_queue.workload(4, 12, 3, normalize=True, ids=True)
        inputs = workload.inputs(CPU, seed=2)
        queue, ids = inputs["queue"].double(), inputs["queue_ids"].clone()
        for i, key in enumerate(inputs["keys"].flatten(0, 1).double()):
            queue[(4 + i) % 12], ids[(4 + i) % 12] = key / key.norm(), i
        truth = workload.truth(inputs)
        torch.testing.assert_close(truth["keys"].double(), queue, rtol=1e-6, atol=1e-7)
        assert torch.equal(truth["ids"], ids)
        assert ids[0] == 8, "the last batch begins again at row 0"

    @pytest.mark.parametrize("ids", [False, True])
    def test_a_pointer_that_stands_still_is_a_wrong_answer(self, ids: bool) -> None:
        workload = key_queue.workload(8, 4096, 16, queue_dtype="bfloat16", ids=ids)
        stuck = key_queue.contender(key_queue_peers.plain_copy, "bfloat16")
        assert row_of(workload, stuck)["match"] is False

    def test_ids_that_do_not_move_are_a_wrong_answer(self) -> None:
        def forgets(queue: torch.Tensor, first: int, ids: torch.Tensor | None) -> key_queue_peers.Ring:
            ring = key_queue_peers.slices(queue, first, None)
            return ring._replace(enqueue=lambda keys, _: ring.enqueue(keys, None), ids=ids)

        row = row_of(key_queue.workload(8, 32, 16, ids=True), key_queue.contender(forgets, "float32"))
        assert row["match"] is False
        assert row["error"]["keys"]["relative"] == 0.0

    def test_contenders_do_not_share_a_queue(self) -> None:
        workload = key_queue.workload(8, 32, 16, ids=True)
        inputs = workload.inputs(CPU, seed=0)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        rows_of(dataclasses.replace(workload, make=lambda params, generator: inputs))
        assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())

    def test_without_the_peers_their_rows_say_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("lightly", "pytorch_metric_learning"):
            monkeypatch.setitem(sys.modules, module, None)
        for module in ("lightly.models.modules.memory_bank", "pytorch_metric_learning.losses"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        rows = rows_of(key_queue.workload(8, 32, 16))
        assert "needs lightly" in rows["lightly MemoryBank"]["reason"]
        assert "needs pytorch-metric-learning" in rows["CrossBatchMemory"]["reason"]
        assert rows["perfvl"]["match"]


class TestInfoNCEStep:
    @pytest.fixture
    def tiny(self) -> Workload:
        return info_nce_step.workload(4, 64, 32)

    def test_every_contender_gives_the_answer(self, tiny: Workload) -> None:
        rows = rows_of(tiny)
        check_rows(rows, {"lightly NTXentLoss"})
        assert set(rows["eager"]["error"]) == {"loss", "query", "rows"}

    def test_lightly_itself_gives_the_answer(self, tiny: Workload) -> None:
        require("lightly")
        assert rows_of(tiny)["lightly NTXentLoss"]["match"]

    def test_the_truth_is_autograd_over_all_logits(self, tiny: Workload) -> None:
        inputs = tiny.inputs(CPU, seed=3)
        query, key, queue = (inputs[name].double() for name in ("query0", "positive0", "queue0"))
        assert (query.norm(dim=1) - 1).abs().min() > 1e-3
        query.requires_grad_()
        unit_key = key / key.norm(dim=1, keepdim=True)
        unit_query = query / query.norm(dim=1, keepdim=True)
        loss = info_nce_peers.moco_loss(unit_query, unit_key, queue.t(), info_nce_step.TEMPERATURE)
        loss.backward()
        truth = tiny.truth(inputs)
        torch.testing.assert_close(truth, {"loss": loss.detach(), "query": query.grad, "rows": truth["rows"]})
        torch.testing.assert_close(truth["rows"], torch.cat([unit_key, queue[4:8]]))

    @pytest.mark.parametrize("part", ["loss", "normalise", "enqueue"])
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_a_part_left_out_is_a_wrong_answer(self, tiny: Workload, part: str, precision: str) -> None:
        def build(queue: torch.Tensor) -> info_nce_step.Parts:
            whole = info_nce_step.eager(queue)

            def unnormalised(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                whole.forward(query.detach(), key)  # the keys are enqueued as they should be
                return info_nce_peers.moco_loss(query, key, queue.t(), info_nce_step.TEMPERATURE)

            left_out = {
                "loss": lambda query, key: 2 * whole.forward(query, key),
                "normalise": unnormalised,
                "enqueue": whole.forward,
            }
            return info_nce_step.Parts(left_out[part], queue if part == "enqueue" else whole.keys)

        row = row_of(tiny, info_nce_step.contender(build, precision=precision))
        assert (row["status"], row["match"]) == ("ok", False)
        assert (row["error"]["rows"]["relative"] < 1e-5) == (part != "enqueue")

    def test_contenders_do_not_share_a_queue(self, tiny: Workload) -> None:
        inputs = tiny.inputs(CPU, seed=0)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        rows_of(dataclasses.replace(tiny, make=lambda params, generator: inputs))
        assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())


class TestBriVLStep:
    @pytest.fixture
    def tiny(self) -> Workload:
        return brivl_step.workload("tiny", 4, 64, 32, 16)

    def test_every_contender_gives_the_answer(self, tiny: Workload) -> None:
        rows = rows_of(tiny)
        check_rows(rows, set())
        assert set(rows["eager"]["error"]) == {"loss", "query0", "query1", "rows0", "rows1", "heads"}
        assert "torch.compile" not in rows

    def test_the_truth_is_autograd_over_all_logits(self, tiny: Workload) -> None:
        inputs = tiny.inputs(CPU, seed=3)
        queries = [inputs[f"query{i}"].double().requires_grad_() for i in (0, 1)]
        total = torch.zeros((), dtype=torch.float64)
        for i, query in enumerate(queries):
            total = total + info_nce_peers.moco_loss(
                query, inputs[f"positive{i}"].double(), inputs[f"queue{i}"].double().t(), brivl_step.TEMPERATURE
            )
        total.backward()
        truth = tiny.truth(inputs)
        torch.testing.assert_close(truth["loss"], total.detach())
        for i, query in enumerate(queries):
            torch.testing.assert_close(truth[f"query{i}"], query.grad)
            assert torch.equal(truth[f"rows{i}"][:4], inputs[f"positive{i}"].double())

    @pytest.mark.parametrize("part", ["loss", "rings", "update"])
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_a_part_left_out_is_a_wrong_answer(self, tiny: Workload, part: str, precision: str) -> None:
        def build(*arguments: list[torch.Tensor]) -> brivl_step.Parts:
            parts = brivl_step.eager()(*arguments)
            left_out = {
                "loss": {"loss": lambda queries, positives: 2 * parts.loss(queries, positives)},
                "rings": {"rings": [ring._replace(enqueue=lambda keys, ids: None) for ring in parts.rings]},
                "update": {"update": lambda: None},
            }
            return parts._replace(**left_out[part])

        row = row_of(tiny, brivl_step.contender(build, precision=precision))
        assert (row["status"], row["match"]) == ("ok", False)

    def test_all_start_from_the_same_heads_and_queues(self, tiny: Workload) -> None:
        inputs = tiny.inputs(CPU, seed=0)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        rows_of(dataclasses.replace(tiny, make=lambda params, generator: inputs))
        assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())
        assert not any(tensor.requires_grad for tensor in inputs.values())


class TestRegistry:
    @pytest.mark.parametrize(
        ("op", "names"),
        [
            (
                "momentum_update",
                ["ema-50x1m-float32", "ema-500x256-float32", "ema-50x1m-bfloat16", "ema-50x1m-bfloat16-to-bfloat16"],
            ),
            ("key_queue", ["enqueue-b256-k65536-d128-float32"]),
            ("brivl_step", ["brivl-step-b16-k16384-d2560"]),
        ],
    )
    def test_workloads_are_listed_by_op_and_each_op_has_a_quick_one(self, op: str, names: list[str]) -> None:
        found = {workload.name: workload for workload in registry.workloads(op)}
        assert set(names) <= set(found)
        assert registry.workloads(op, quick=True)
        assert all(next(iter(workload.contenders)) == "perfvl" for workload in found.values())
        assert all(workload.contenders["eager"].role == "eager" for workload in found.values())

    @pytest.mark.parametrize(
        "name", ["ema-50x1m-bfloat16-to-bfloat16", "brivl-step-b16-k16384-d2560", "moco-step-b256-k65536-d128"]
    )
    def test_the_small_copy_that_warms_libraries_up_is_right_and_small(self, name: str) -> None:
        (workload,) = registry.workloads(None, name)
        small = workload.shrunk()
        assert workload.memory
        assert row_of(small, workload.contenders["perfvl"])["match"]
        inputs = small.inputs(CPU, seed=0)
        assert sum(tensor.numel() for tensor in inputs.values()) < 40_000_000

    def test_a_library_that_breaks_on_import_is_a_reason_and_not_a_crash(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "built_for_another_torch.py").write_text("raise RuntimeError('operator x::y does not exist')")
        (tmp_path / "lacks_a_part.py").write_text("import no_such_part")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(Unavailable, match="operator x::y does not exist"):
            imported("built_for_another_torch", "it")
        with pytest.raises(Unavailable, match="importing lacks_a_part failed: No module named 'no_such_part'"):
            imported("lacks_a_part", "it")
        with pytest.raises(Unavailable, match="needs it: pip install it"):
            imported("no_such_library.part", "it: pip install it")
