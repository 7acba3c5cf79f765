"""The benchmark harness: it must measure what it says, and must not print a win where the answer is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from perfvl.benchmarks import cli, info_nce, info_nce_overhead, registry, results, tables, terminal, text, timing
from perfvl.benchmarks.accuracy import errors, matches
from perfvl.benchmarks.ceilings import measure_ceilings, roofline_seconds
from perfvl.benchmarks.machine import Interference, describe
from perfvl.benchmarks.memory import MemoryProbe
from perfvl.benchmarks.runner import run_workload
from perfvl.benchmarks.workload import Contender, Tensors, Unavailable, Workload

CPU = torch.device("cpu")
CEILINGS = {"bytes_per_second": 1e10, "float32_flops_per_second": 1e12, "bfloat16_flops_per_second": 4e12}


def square(factor: float = 1.0, delay: float = 0.0) -> Contender:
    """factor * sum(x^2); only a factor of 1 is right."""

    def build(inputs: Tensors) -> Any:
        def step() -> torch.Tensor:
            time.sleep(delay)
            return factor * inputs["x"].square().sum()

        return step

    return Contender(build)


def missing(inputs: Tensors) -> Any:
    raise Unavailable("no such library here")


def failing(inputs: Tensors) -> Any:
    def step() -> None:
        raise RuntimeError("illegal instruction\nsecond line")

    return step


@pytest.fixture
def toy() -> Workload:
    """The sum of squares of 64 numbers, with contenders of every kind."""
    return Workload(
        op="toy",
        name="toy-64",
        title="Sum of squares of 64 numbers",
        params={"n": 64},
        make=lambda params, generator: {"x": torch.randn(params["n"], generator=generator)},
        contenders={
            "perfvl": dataclasses.replace(square(delay=0.001), role="perfvl"),
            "eager": dataclasses.replace(square(delay=0.004), role="eager"),
            "right, slower": square(delay=0.002),
            "wrong, fast": square(1.01),
            "missing": Contender(missing),
            "failing": Contender(failing),
            "nothing": dataclasses.replace(square(0.0), role="bound"),
        },
        truth=lambda inputs: {
            "loss": inputs["x"].detach().double().square().sum(),
            "x": 2 * inputs["x"].detach().double(),
        },
        leaves=("x",),
        bytes=512,
        flops=128,
    )


def run(workload: Workload, **options: Any) -> results.Record:
    """A results document of one workload without memory."""
    record = run_workload(workload, CPU, timing.cpu_clock, seconds=0.05, measure_memory=False, **options)
    return results.document([record], machine=describe(CPU), settings={}, ceilings=CEILINGS, memory_check=None)


def by_name(document: results.Record) -> dict[str, results.Row]:
    return {row["contender"]: row for row in document["workloads"][0]["rows"]}


class TestTiming:
    @pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.8, 1.0])
    @pytest.mark.parametrize("count", [1, 2, 7, 10])
    def test_percentiles_agree_with_numpy(self, count: int, fraction: float) -> None:
        samples = torch.rand(count, generator=torch.Generator().manual_seed(count)).tolist()
        assert timing.percentile(samples, fraction) == pytest.approx(numpy.percentile(samples, 100 * fraction))

    def test_percentile_of_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no samples"):
            timing.percentile([], 0.5)

    def test_every_contender_runs_once_per_round_in_random_order(self) -> None:
        ran: list[str] = []
        calls = {name: (lambda name=name: ran.append(name)) for name in "abcd"}
        samples = timing.interleave(calls, timing.cpu_clock, seconds=0.0, min_rounds=200)
        assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abcd", 200)
        rounds = [tuple(ran[i : i + 5]) for i in range(0, len(ran), 5)]
        assert all(sorted(order) == ["a", "b", "c", "d"] for _, *order in rounds)
        # The untimed call first, then every contender in every place, behind every other one, about as often.
        assert all(warm == order[-1] for warm, *order in rounds)
        places = Counter(place for _, *order in rounds for place in enumerate(order))
        assert len(places) == 16
        assert min(places.values()) > 25, "of 50 expected"
        followers = Counter(pair for round_ in rounds for pair in itertools.pairwise(round_))
        assert len(followers) == 12
        assert min(followers.values()) > 35, "of 67 expected"

    def test_sampling_stops_with_the_time_budget(self) -> None:
        samples = timing.interleave({"sleep": lambda: time.sleep(0.01)}, timing.cpu_clock, seconds=0.1, min_rounds=2)
        assert 2 <= len(samples["sleep"]) <= 11

    def test_the_clock_measures_one_call_of_many(self) -> None:
        assert 0.002 <= timing.cpu_clock(lambda: time.sleep(0.002), 10) < 0.02


class TestMalloc:
    def test_freed_memory_is_kept(self) -> None:
        code = """
import resource, torch
from perfvl.benchmarks.machine import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 24).fill_(0)  # 64 MB, which malloc takes from the kernel and gives back at once by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(4): faults()
print(int(kept), faults())
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        kept, faults = map(int, done.stdout.split())
        if platform.libc_ver()[0] != "glibc":
            pytest.skip("malloc is not glibc's")
        assert kept
        assert faults < 100, "16,384 pages would be mapped anew"


class TestAccuracy:
    def test_errors_are_absolute_and_relative_to_the_truth(self) -> None:
        report = errors({"y": torch.tensor([3.0, 4.5])}, {"y": torch.tensor([3.0, 4.0])})
        assert report["y"] == {"max_abs": 0.5, "relative": pytest.approx(0.1)}

    @pytest.mark.parametrize(
        "found",
        [
            {},
            {"y": torch.ones(3)},
            {"y": torch.tensor([math.nan, 1.0])},
            {"y": torch.tensor([math.inf, 1.0])},
            {"y": torch.zeros(2)},
            {"y": torch.full((2,), 2.0)},
        ],
        ids=["missing", "shape", "nan", "inf", "zero", "doubled"],
    )
    def test_a_wrong_answer_never_matches(self, found: Tensors) -> None:
        assert not matches(errors(found, {"y": torch.ones(2)}), 0.5)

    def test_nothing_compared_is_no_match(self) -> None:
        assert not matches({}, 1.0)


class TestRunner:
    def test_rows_tell_right_wrong_missing_and_failing_contenders_apart(self, toy: Workload) -> None:
        document = run(toy)
        rows = by_name(document)
        assert [row["contender"] for row in document["workloads"][0]["rows"]] == list(toy.contenders)
        assert {name: row["match"] for name, row in rows.items()} == {
            "perfvl": True, "eager": True, "right, slower": True, "wrong, fast": False,
            "missing": None, "failing": None, "nothing": None,
        }  # fmt: skip
        assert rows["wrong, fast"]["error"]["loss"]["relative"] == pytest.approx(0.01, rel=1e-3)
        assert (rows["missing"]["status"], rows["missing"]["reason"]) == ("unavailable", "no such library here")
        assert (rows["failing"]["status"], rows["failing"]["reason"]) == ("failed", "RuntimeError: illegal instruction")
        assert rows["perfvl"]["seconds"]["median"] < rows["eager"]["seconds"]["median"]

    def test_versions_that_dynamo_counts_are_those_of_the_workload(
        self, toy: Workload, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        did: list[str] = []
        monkeypatch.setattr(torch.compiler, "reset", lambda: did.append("reset"))

        def compiled(inputs: Tensors) -> Any:
            did.append("built")
            return square().build(inputs)

        contenders = {**toy.contenders, "one": Contender(compiled, compiles=True)}
        contenders["two"] = contenders["one"]
        workload = dataclasses.replace(toy, contenders=contenders)
        run(workload)
        assert did == ["reset", "built", "built"], "a reset between them would let the first compile again when timed"
        run(workload, leave_out=lambda contender: contender.compiles)
        assert did == ["reset", "built", "built"]

    def test_a_wrong_answer_is_no_win_and_no_rival(self, toy: Workload) -> None:
        workload = run(toy)["workloads"][0]
        rows = {row["contender"]: row for row in workload["rows"]}
        assert rows["wrong, fast"]["seconds"]["median"] < rows["perfvl"]["seconds"]["median"]
        assert results.speedup(workload, rows["wrong, fast"]) is None
        assert results.perfvl_against(workload, rows["wrong, fast"]) is None
        assert results.best_peer(workload, rows["perfvl"])["contender"] == "right, slower"
        assert text.cells(workload, rows["wrong, fast"], device_type="cpu")[-1] == "NO: invalid"

    def test_a_wrong_perfvl_claims_nothing(self, toy: Workload) -> None:
        wrong = {**toy.contenders, "perfvl": dataclasses.replace(square(1.01), role="perfvl")}
        workload = run(dataclasses.replace(toy, contenders=wrong))["workloads"][0]
        assert all(results.perfvl_against(workload, row) is None for row in workload["rows"])
        assert "wrong" in text.verdict(workload)
        assert "faster" not in text.verdict(workload)

    def test_a_workload_that_cannot_be_made_keeps_its_rows(self, toy: Workload) -> None:
        def make(params: Any, generator: torch.Generator) -> Tensors:
            raise Unavailable("needs a data set")

        rows = by_name(run(dataclasses.replace(toy, make=make)))
        assert {row["status"] for row in rows.values()} == {"unavailable"}
        assert set(rows) == set(toy.contenders)

    def test_left_out_contenders_are_not_built(self, toy: Workload) -> None:
        document = run(toy, leave_out=lambda contender: contender.role != "perfvl")
        assert list(by_name(document)) == ["perfvl"]

    def test_the_roofline_fraction_is_least_time_over_median(self, toy: Workload) -> None:
        row = by_name(run(toy))["perfvl"]
        assert row["roofline_fraction"] == pytest.approx(512 / 1e10 / row["seconds"]["median"])
        assert roofline_seconds(1, 10**12, "float32", CEILINGS) == 1.0
        assert roofline_seconds(1, 10**12, "bfloat16", CEILINGS) == 0.25
        assert roofline_seconds(None, None, "float32", CEILINGS) is None


@pytest.fixture(scope="module")
def probe() -> Iterator[MemoryProbe]:
    if sys.platform != "linux":
        pytest.skip("the resident set is read from /proc")
    with MemoryProbe() as probe:
        yield probe


class TestMemory:
    @pytest.mark.parametrize("size", [16 << 20, 100 << 20])
    def test_known_allocations_are_seen_whoever_made_them(self, probe: MemoryProbe, size: int) -> None:
        measured = probe.check(size)["measured_bytes"]
        assert measured["torch"] == pytest.approx(size, abs=1.5e6)
        assert measured["malloc"] == pytest.approx(size, abs=1.5e6)

    def test_torch_counts_its_own_allocations_only(self, probe: MemoryProbe) -> None:
        target = "perfvl.benchmarks.memory_worker:known_allocation"
        assert probe.ask(target, size=1 << 24, kind="torch")["torch_peak_bytes"] == 1 << 24
        assert probe.ask(target, size=1 << 24, kind="malloc")["torch_peak_bytes"] == 0

    def test_a_failure_is_reported_and_the_worker_lives_on(self, probe: MemoryProbe) -> None:
        target = "perfvl.benchmarks.memory_worker:known_allocation"
        assert "KeyError" in probe.ask(target, size=1, kind="no such kind")["reason"]
        assert probe.ask(target, size=1 << 20, kind="malloc")["peak_bytes"] > 0

    def test_eager_keeps_the_logits_and_a_chunked_loop_does_not(self, probe: MemoryProbe) -> None:
        workload = next(w for w in registry.workloads("info_nce") if w.name == "moco-b32-k4096-d128-float32")
        one_copy_of_the_logits = 32 * 4097 * 4
        clone = 4096 * 128 * 4
        eager = probe.contender(workload, "eager", 0)["torch_peak_bytes"]
        loop = probe.contender(workload, "chunked mm loop", 0)["torch_peak_bytes"]
        assert eager > clone + one_copy_of_the_logits
        assert loop < one_copy_of_the_logits / 2

    def test_a_run_puts_memory_into_its_rows(self, probe: MemoryProbe) -> None:
        workload = next(w for w in registry.workloads("info_nce") if w.name == "moco-b32-k4096-d128-float32")
        ours = dataclasses.replace(workload, contenders={"perfvl": workload.contenders["perfvl"]})
        record = run_workload(ours, CPU, timing.cpu_clock, seconds=0.01, probe=probe)
        memory = record["rows"][0]["memory"]
        assert memory["torch_peak_bytes"] > 32 * 128 * 4, "at least the gradient is allocated"
        assert memory["peak_bytes"] < 32 << 20


class TestResults:
    def test_a_document_survives_saving_and_names_its_schema(self, toy: Workload, tmp_path: Path) -> None:
        document = run(toy)
        results.save(document, tmp_path / "deep" / "cpu.json")
        loaded = results.load(tmp_path / "deep" / "cpu.json")
        assert loaded == json.loads(json.dumps(document))
        assert (loaded["schema"], loaded["schema_version"]) == ("perfvl-benchmark", 1)
        assert {"device", "torch", "threads", "commit"} <= set(loaded["machine"])
        row = loaded["workloads"][0]["rows"][0]
        assert {
            "contender",
            "role",
            "precision",
            "status",
            "seconds",
            "roofline_fraction",
            "memory",
            "error",
            "match",
        } <= set(row)
        assert set(row["seconds"]) == {"median", "p20", "p80", "min", "rounds", "interference"}

    @pytest.mark.parametrize("content", ["{}", "[]", '{"schema": "perfvl-benchmark", "schema_version": 2}'])
    def test_another_schema_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match="expected schema perfvl-benchmark version 1"):
            results.load(tmp_path / "x.json")

    def test_like_precision_is_compared_with_like(self) -> None:
        def row(name: str, role: str, precision: str, median: float) -> dict:
            seconds = {"median": median, "p20": median, "p80": median, "min": median, "rounds": 5, "interference": 0.0}
            return {"contender": name, "role": role, "precision": precision, "seconds": seconds, "match": True}

        half = row("autocast", "peer", "bfloat16", 1.0)
        rows = [
            row("a", "perfvl", "float32", 2.0),
            row("b", "perfvl", "bfloat16", 0.5),
            row("e", "eager", "float32", 8.0),
            half,
        ]
        workload = {"rows": rows}
        assert results.perfvl_against(workload, half) == 2.0
        assert results.perfvl_against(workload, rows[2]) == 4.0
        assert results.best_peer(workload, rows[0])["contender"] == "e", "a lower precision is no rival"
        assert results.best_peer(workload, rows[1])["contender"] == "autocast"


class TestReports:
    @pytest.mark.parametrize(
        ("value", "words"), [(2.5, "2.50x faster"), (0.5, "2.00x slower"), (1.01, "as fast"), (None, "–")]
    )
    def test_losses_are_said_as_plainly_as_wins(self, value: float | None, words: str) -> None:
        assert text.against(value) == words

    @pytest.mark.parametrize(
        ("value", "words"), [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (4.2e-6, "4.20 µs"), (3e-7, "0.30 µs")]
    )
    def test_times_carry_their_unit(self, value: float, words: str) -> None:
        assert text.seconds(value) == words

    def test_a_noisy_timing_gives_no_exact_ratio(self, toy: Workload) -> None:
        document = run(toy)
        for row in by_name(document).values():
            if row["seconds"]:
                middle = row["seconds"]["median"]
                row["seconds"] |= {"p20": middle, "p80": middle, "interference": 0.0}
        assert "NOISY" not in text.verdict(document["workloads"][0])
        assert "~" not in text.verdict(document["workloads"][0])
        by_name(document)["eager"]["seconds"]["p80"] *= 10
        assert "~" in text.verdict(document["workloads"][0])
        assert "NOISY (p80 above 1.5 x p20): eager." in text.verdict(document["workloads"][0])
        by_name(document)["perfvl"]["seconds"]["interference"] = 0.42
        assert "other processes took 42 % of the cores" in text.verdict(document["workloads"][0])

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
    def test_interference_counts_other_processes_and_not_this_one(self) -> None:
        def spin(seconds: float) -> None:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        own, wall = time.process_time(), time.perf_counter()
        alone = Interference()
        spin(0.5)
        quiet = alone.fraction()
        own = time.process_time() - own
        wall = time.perf_counter() - wall
        beside = Interference()
        code = "import time; e = time.perf_counter() + 1.5\nwhile time.perf_counter() < e: pass"
        other = subprocess.Popen([sys.executable, "-c", code])
        time.sleep(1.0)
        loud = beside.fraction()
        other.wait()
        assert quiet is not None
        assert loud is not None
        cores = os.cpu_count() or 1
        assert loud > 0.25 / cores, "another process was busy"
        assert quiet < 1.0 - own / (wall * cores) + 0.1, "this process' own work is not interference"

    def test_a_reading_below_the_resolution_is_no_number(self) -> None:
        assert text.memory({"memory": {"peak_bytes": 4096}}, device_type="cpu") == "< 1 MB"
        assert text.memory({"memory": {"peak_bytes": 4096}}, device_type="cuda") == "0.00 MB"
        assert text.memory({"memory": {"reason": "unknown"}}, device_type="cpu") == "–"

    @pytest.mark.parametrize("with_rich", [True, False])
    def test_the_terminal_shows_every_row(
        self, toy: Workload, with_rich: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not with_rich:
            monkeypatch.setattr(terminal, "rich", None)
        terminal.print_tables(run(toy))
        output = capsys.readouterr().out
        assert all(name in output for name in toy.contenders)
        assert "NO: invalid" in output
        assert "no such library" in output

    def test_the_html_report_is_one_file_without_links(self, toy: Workload, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        from perfvl.benchmarks.html_report import write_html

        document = run(toy)
        document["workloads"][0]["title"] = "a < b & c"
        write_html(document, tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert all(f">{name}<" in page for name in ("perfvl", "eager", "wrong, fast"))
        assert "a &lt; b &amp; c" in page
        assert "wrong answer" in page
        assert page.count("<svg") == 2
        assert not any(link in page for link in ("<script", "<link", " src=", "@import"))

    def test_without_matplotlib_the_html_option_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert cli.main(["--workload", "overhead-forward-backward", "--html", "x.html"]) == 2
        assert "perfvl[bench]" in capsys.readouterr().err

    def test_the_readme_tables_replace_what_is_between_the_markers(self, toy: Workload, tmp_path: Path) -> None:
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
        results.save(run(toy), tmp_path / "cpu.json")
        assert tables.main([str(readme), str(tmp_path / "cpu.json")]) == 0
        written = readme.read_text()
        assert written.startswith(f"before\n{tables.BEGIN}\n**")
        assert written.endswith(f"{tables.END}\nafter\n")
        assert "old" not in written
        assert "| Sum of squares of 64 numbers |" in written
        assert "(right, slower)" in written, "the rival is the fastest right answer, not the fastest"
        assert tables.main([str(readme), str(tmp_path / "cpu.json")]) == 0
        assert readme.read_text() == written
        assert "malloc" not in written
        results.save({**run(toy), "settings": {"keeps_freed_memory": True}}, tmp_path / "cpu.json")
        assert tables.main([str(readme), str(tmp_path / "cpu.json")]) == 0
        assert "; malloc keeps freed memory.\n" in readme.read_text()

    def test_a_digest_has_a_line_for_each_op_and_counts_what_is_lost(self, toy: Workload, tmp_path: Path) -> None:
        results.save(record := run(toy), tmp_path / "cpu.json")
        (tmp_path / "readme.md").write_text(f"{tables.BEGIN}{tables.END}")
        assert tables.main(["--digest", str(tmp_path / "readme.md"), str(tmp_path / "cpu.json")]) == 0
        written = (tmp_path / "readme.md").read_text()
        assert written.count(f"| `{toy.op}` | 1 |") == 1
        for row in (row for row in record["workloads"][0]["rows"] if row["seconds"]):
            row["seconds"]["median"] = 2.0 if row["role"] == "perfvl" else 1.0
        assert tables.digest(record).splitlines()[-1].endswith("**0.50x** (0.50x to 0.50x) | 1 | none |")
        next(row for row in record["workloads"][0]["rows"] if row["role"] == "perfvl")["match"] = False
        line = tables.digest(record).splitlines()[-1]
        assert line.startswith(f"| `{toy.op}` | 1 |")
        assert line.endswith("| none | 1 |")

    @pytest.mark.parametrize(
        "document", ["no markers", f"{tables.END}{tables.BEGIN}", f"{tables.BEGIN * 2}{tables.END}"]
    )
    def test_a_document_without_its_markers_is_refused(self, document: str) -> None:
        with pytest.raises(ValueError, match="once each"):
            tables.replace(document, "")


class TestInfoNCEWorkloads:
    @pytest.mark.parametrize("queue_dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("directions", [1, 2])
    def test_every_contender_gives_the_answer(self, queue_dtype: str, directions: int) -> None:
        workload = info_nce.workload("Tiny", 8, 4100, 16, queue_dtype=queue_dtype, directions=directions)
        rows = by_name(run(workload, leave_out=lambda contender: contender.compiles))
        assert {row["status"] for row in rows.values() if row["status"] != "unavailable"} == {"ok"}, rows
        assert all(row["match"] for row in rows.values() if row["status"] == "ok" and row["role"] != "bound"), rows
        assert rows["chunked mm loop"]["status"] == "ok"

    @pytest.mark.parametrize("kind", ["backward", "forward"])
    def test_the_truth_is_cross_entropy_over_all_logits(self, kind: str) -> None:
        workload = info_nce.workload("Tiny", 8, 5000, 16, backward=kind == "backward")
        inputs = workload.inputs(CPU, seed=3)
        query, positive, queue = (inputs[f"{name}0"].detach().double() for name in ("query", "positive", "queue"))
        query.requires_grad_()
        logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ queue.t()], dim=1) / 0.07
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
        loss.backward()
        truth = workload.expected(workload.truth(inputs))
        torch.testing.assert_close(truth["loss"], loss.detach())
        if kind == "backward":
            torch.testing.assert_close(truth["query0"], query.grad)
        else:
            assert set(truth) == {"loss"}

    def test_forward_only_every_contender_gives_the_loss_without_a_gradient(self) -> None:
        workload = info_nce.workload("Tiny", 8, 4100, 16, backward=False)
        rows = by_name(run(workload, leave_out=lambda contender: contender.compiles))
        timed = [row for row in rows.values() if row["status"] == "ok" and row["role"] != "bound"]
        assert len(timed) >= 6
        assert all(row["match"] and set(row["error"]) == {"loss"} for row in timed), rows

    def test_equal_seeds_give_equal_inputs(self) -> None:
        workload = info_nce.workload("Tiny", 4, 64, 8)
        first, again, other = (workload.inputs(CPU, seed)["queue0"] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_names_are_unique_and_the_quick_set_is_a_part(self) -> None:
        everything = registry.workloads()
        assert len({w.name for w in everything}) == len(everything)
        assert 0 < len(registry.workloads(quick=True)) < len(everything)
        assert [w.name for w in registry.workloads(None, "moco-b32-k4096*")] == ["moco-b32-k4096-d128-float32"]
        with pytest.raises(ValueError, match="expected one of"):
            registry.workloads("no such op")

    def test_overhead_rows_cover_inference_forward_and_backward(self) -> None:
        kinds = [(bool(w.leaves), w.backward) for w in info_nce_overhead.WORKLOADS]
        assert kinds == [(False, False), (True, False), (True, True)]


class TestCommandLine:
    def test_a_small_run_writes_json_and_html(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        pytest.importorskip("matplotlib")
        files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
        code = cli.main(
            [
                "--device",
                "cpu",
                "--workload",
                "moco-b32-k4096",
                "--seconds",
                "0.2",
                "--no-compile",
                "--no-memory",
                *files,
            ]
        )
        document = results.load(tmp_path / "r.json")
        rows = by_name(document)
        assert code == 0, rows
        assert "torch.compile" not in rows
        assert rows["perfvl"]["match"]
        assert rows["perfvl"]["roofline_fraction"] > 0
        assert "moco-b32-k4096-d128-float32" in capsys.readouterr().err
        assert (tmp_path / "r.html").stat().st_size > 10_000

    def test_listing_runs_nothing(self, capsys: pytest.CaptureFixture) -> None:
        assert cli.main(["--list", "--op", "info_nce", "--quick"]) == 0
        assert "moco-b256-k65536-d128-float32" in capsys.readouterr().out

    def test_an_unknown_workload_is_an_error(self, capsys: pytest.CaptureFixture) -> None:
        assert cli.main(["--workload", "no-such-workload"]) == 2
        assert "--list" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
    def test_asking_for_a_missing_gpu_is_an_error(self, capsys: pytest.CaptureFixture) -> None:
        assert cli.main(["--device", "cuda", "--workload", "overhead"]) == 2
        assert "No CUDA device" in capsys.readouterr().err


def test_ceilings_are_plausible() -> None:
    ceilings = measure_ceilings(CPU, seconds=0.01)
    assert 1e8 < ceilings["bytes_per_second"] < 1e13
    assert 1e9 < ceilings["float32_flops_per_second"] < 1e15


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (("ok", True), ("ok", True), True),
        (("ok", True), ("unavailable", None), True),
        (("ok", True), ("failed", None), False),
        (("ok", True), ("ok", False), False),
        (("ok", False), ("ok", True), False),
        (("unavailable", None), ("ok", True), False),
    ],
)
def test_a_run_is_sound_if_perfvl_ran_and_was_right(first, second, expected):
    rows = [{"role": "perfvl", "status": status, "match": match} for status, match in (first, second)]
    assert results.sound({"rows": rows}) is expected
    assert not results.sound({"rows": []})
