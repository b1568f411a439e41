"""What needs engines in this process: the benchmarks, and an asker of ``era-vllm eval``.

    options.py       flags, and keys of the JSON, of each
    clock.py         the timing harness: interleaved rounds, every cell once a round, ratios within
    stages.py        time inside a model's modules while it runs
    inputs.py        pictures and prompts that no cache has seen
    reducer.py       ``bench reducer``: the pruning step (``pruning_step.py``), and its growth
    engines.py       an engine started, ended, asked, timed; ``bound.py``: one without a reducer
    sides.py         of a dummy model, side by side: ``attention.py``, ``serve.py``, ``gap.py``
    first_token.py   the last part of ``era-vllm demo``
    report.py        goals, tables, JSON (``provenance.py``: its head); ``plots.py``: its picture

``engines.py``, ``taken.py``, ``bound.py``, ``gap_engines.py`` and their users need vllm.
"""
