"""Benchmarks of perfvl: workloads, the runner that times them, and the reports made from a run.

``python -m perfvl bench`` is the way in (``cli.py``). A workload (``workload.py``) names its contenders and its float64
truth; the runner (``runner.py``) times them interleaved (``timing.py``), measures memory (``memory.py``) and error
(``accuracy.py``), and writes one schema-versioned document (``results.py``) that the terminal table (``terminal.py``),
the HTML report (``html_report.py``) and the README's tables (``tables.py``) are all made from.
"""
