"""The one exception that means: the input was bad, not the program."""


class InputError(Exception):
    """Something the user gave cannot be used; the command line prints it as one line and exits with status 2.

    Args:
        what: What is wrong, as a clause.
        where: The file, option or name it was found in.
        mend: What to do about it.
    """

    def __init__(self, what: str, *, where: object = None, mend: str = "") -> None:
        line = what if where is None else f"{what} ({where})"
        super().__init__(" ".join(f"{line}: {mend}".split()) if mend else " ".join(line.split()))
