"""Stopping after the current step on Ctrl-C (SIGINT) or on a scheduler's SIGTERM."""

import signal


class Interruption:
    """Keeps the first SIGINT or SIGTERM as `signal`, for the loop to check after each step.

    A second one exits at once, with 128 + its number.
    """

    def __enter__(self) -> "Interruption":
        self.signal = 0  # the number of the signal received, or 0
        self._previous = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _receive(self, number: int, _) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
