"""How fast a run trains: seconds over all its parts, tokens and steps since the last log line."""

import time


class Pace:
    def __init__(self, seconds_before: float):
        """`seconds_before`: what the run had taken before it was stopped and resumed."""
        self.begun = time.monotonic() - seconds_before
        self.window_begun, self.window_steps, self.window_tokens = time.monotonic(), 0, 0

    def open_window(self) -> None:
        """Start measuring anew: after a log line, and after an evaluation, which is not training."""
        self.window_begun, self.window_steps, self.window_tokens = time.monotonic(), 0, 0

    def add(self, tokens: int) -> None:
        """One more step."""
        self.window_steps += 1
        self.window_tokens += tokens

    @property
    def seconds(self) -> float:
        """Of the whole run so far."""
        return time.monotonic() - self.begun

    def measures(self) -> dict[str, float]:
        """Of the steps in the window, for metrics.jsonl."""
        spent = time.monotonic() - self.window_begun
        return {"tokens_per_second": self.window_tokens / spent, "step_seconds": spent / self.window_steps}
