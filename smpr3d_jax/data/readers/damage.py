"""Telling the damage that a library finds in a file from a mistake of our own."""

import pathlib
import traceback


def raised_in(library: str, error: BaseException) -> bool:
    """Whether an error arose inside this library, or in what it called."""
    stack = traceback.walk_tb(error.__traceback__)
    return any(library in pathlib.Path(frame.f_code.co_filename).parts for frame, _ in stack)
