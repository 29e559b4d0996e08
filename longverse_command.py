"""The entry of the `longverse` command.

It stands outside the package so that two environment variables are set in time. LONGVERSE_COMMAND, before `import
longverse`: the command needs no transformers classes, whose import takes seconds. OMP_WAIT_POLICY, before torch: by
default its worker threads spin while they wait for one another, and where another program has a core they spin that
core away; two threads on two busy cores then write twenty times slower.
"""

import os
import sys


def main() -> None:
    """Run the command and leave with its exit code."""
    os.environ["LONGVERSE_COMMAND"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from longverse.cli import main as run

        code = run()
    except KeyboardInterrupt:  # while importing
        sys.stderr.write("\nlongverse: stopped.\n")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
