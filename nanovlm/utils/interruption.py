"""Being asked to stop: Ctrl-C, or the SIGTERM of a scheduler."""

import signal


class Interruption:
    """Turns the first SIGINT or SIGTERM into a request that the loop answers after its step; a second one stops at once."""

    def __enter__(self) -> "Interruption":
        self.signal = 0  # the one that asked, or 0
        self._previous = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _ask(self, number: int, _) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
