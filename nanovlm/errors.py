"""The one exception that users are meant to see."""


class NanoVLMError(Exception):
    """One line: what is wrong, where (file, line, tensor, key), and what to do about it."""
