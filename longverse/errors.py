"""The one exception that speaks to a user, and what turns Python's own into it."""

from pathlib import Path


class UserError(ValueError):
    """A mistake the user can mend: one sentence that says what, the limit and the remedy.

    The commands print it as one line and leave with exit code 2; every other exception is a defect of ours
    and keeps its traceback.
    """


def expand(path: str | Path) -> Path:
    """The path with a leading ~ or ~name replaced by that home folder; UserError where there is no such one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = Path(path).parts[0]
        raise UserError(
            f"{path} begins with {home}, which is nobody's home folder here: write ./{home} or the whole path."
        ) from None
