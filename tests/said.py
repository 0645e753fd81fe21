"""A progress that keeps what it is told."""

from expunge.progress import Silent


class Said(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def say(self, message: str) -> None:
        self.notes.append(message)
