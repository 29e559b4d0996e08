"""The entry of the `longverse` command.

It stands outside the package so that a few environment variables are set in time. LONGVERSE_COMMAND, before `import
longverse`: the command needs no transformers classes, whose import takes seconds. OMP_WAIT_POLICY, before torch: by
default its worker threads spin while they wait for one another, and where another program has a core they spin that
core away; two threads on two busy cores then write twenty times slower. LRU_CACHE_CAPACITY (torch's) and
ONEDNN_PRIMITIVE_CACHE_CAPACITY: each keeps about a megabyte for every shape of a bfloat16 product, by default of 1,024
shapes, and texts of all lengths make as many.
"""

import os
import sys


def main() -> None:
    """Run the command and leave with its exit code."""
    os.environ["LONGVERSE_COMMAND"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "256")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    try:
        from longverse.cli import main as run

        code = run()
    except KeyboardInterrupt:  # while importing
        sys.stderr.write("\nlongverse: stopped.\n")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
