"""What ``era-vllm bench`` measures with, free of vLLM: rounds, stages, fits, goals, tables, plots.

    clock.py    interleaved rounds: every cell once a round, ratios within a round
    stages.py   time inside a model's modules while it runs
    inputs.py   pictures and prompts that no cache has seen
    fit.py      power laws
    reducer.py  the pruning step alone, and a vision tower beside it
    report.py   summaries, goals, tables
    plots.py    one picture a benchmark

The engines that are timed are in ``cli/bench_engines.py``.
"""
