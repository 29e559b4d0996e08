"""`python -m longverse`: the same as the `longverse` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
