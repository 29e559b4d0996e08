"""The one exception that speaks to a user."""


class UserError(ValueError):
    """A mistake the user can mend: one sentence that says what, the limit and the remedy.

    The commands print it as one line and leave with exit code 2; every other exception is a defect of ours
    and keeps its traceback.
    """
