"""Errors that end a program, and how one is said in a line."""


class UsageError(ValueError):
    """Settings or a checkpoint that a command line should not have named."""

    exit_code = 2  # of a program that ends with it


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
