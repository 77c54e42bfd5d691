"""The rooms of onecard: what the scripts at the root are built from. docs/design.md says what is where."""


class UserError(ValueError):
    """A mistake that the user can correct: the text says what (file, key, value), why, and what to do.

    Every error of this kind derives from it. Scripts print the text without a traceback and exit with 2.
    """
