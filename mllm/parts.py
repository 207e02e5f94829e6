"""What is told of a model's parts, for who tells it on and need not import a model."""

from __future__ import annotations

from pipelines.value import spec


@spec
class PartReport:
    """One line of the trained/frozen table."""

    part: str
    trained: int
    frozen: int
    lr: float | None

    def line(self) -> str:
        state = "frozen" if self.lr is None else f"trained at lr {self.lr:g}"
        some = f" ({self.trained:,} of them)" if self.trained and self.frozen else ""
        return f"{self.part:<10} {self.trained + self.frozen:>15,} parameters, {state}{some}"
