"""Runs a program whose vLLM forks its processes, where the CPU's vLLM would spawn them.

Usage: forked.py SCRIPT ARGUMENTS, or forked.py -c CODE ARGUMENTS

Each process of a server that is spawned imports vLLM anew, for ten seconds of a core; forked ones
have what their parent has. That a server works as it starts by itself is shown by the first of
`tests/server/conftest.py` and by all of `tests/server/test_kills.py`.
"""

import multiprocessing
import runpy
import sys
from pathlib import Path

FORKED = (sys.executable, str(Path(__file__)))
"""What such a command begins with."""


def main() -> None:
    """Take this file's place by the program's."""
    from vllm.platforms import current_platform
    from vllm.utils import system_utils  # before those who take the function from it

    if current_platform.is_cpu():
        system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    _, program, *words = sys.argv
    if program == "-c":
        sys.path[0], code = "", words.pop(0)
        sys.argv = ["-c", *words]
        exec(code, {"__name__": "__main__"})  # noqa: S102
        return
    sys.path[0], sys.argv = str(Path(program).parent), [program, *words]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
