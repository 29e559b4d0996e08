"""The entry of the `longverse` command.

It stands outside the package so that the environment variable is set before `import longverse`: the command needs no
transformers classes, whose import takes seconds.
"""

import os
import sys


def main() -> None:
    """Run the command and leave with its exit code."""
    os.environ["LONGVERSE_COMMAND"] = "1"
    try:
        from longverse.cli import main as run

        code = run()
    except KeyboardInterrupt:  # while importing
        sys.stderr.write("\nlongverse: stopped.\n")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
