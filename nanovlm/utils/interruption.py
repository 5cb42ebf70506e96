"""Requests to stop: Ctrl-C, or the SIGTERM of a scheduler."""

import signal


class Interruption:
    """Notes the first SIGINT or SIGTERM in `signal` (0: none yet); a second one exits at once."""

    def __enter__(self) -> "Interruption":
        self.signal = 0
        signals = (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._note) for number in signals}
        return self

    def _note(self, number: int, _) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
