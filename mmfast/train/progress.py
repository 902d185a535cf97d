"""Progress on a terminal as a bar, elsewhere as lines."""

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

LINE_EVERY = 10.0  # seconds, where the output is no terminal
SHOWN = ("image", "text", "speech", "picture", "generator", "discriminator")


class _Bar(RichProgress):
    """A bar with a line of losses below it."""

    losses = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.losses, style="dim")


class Progress:
    """A context in which `show` tells how far the training is, if `shown`."""

    def __init__(self, shown: bool = True) -> None:
        console = Console()
        self.shown = shown
        self.said = float("-inf")
        self.bar: _Bar | None = None
        if shown and console.is_terminal:
            self.bar = _Bar(
                BarColumn(), "{task.percentage:3.0f} %", "{task.description}", TimeElapsedColumn(), console=console
            )
            self.bar.add_task("first steps", total=1.0)

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, fraction: float, step: int, losses: dict[str, float], speed: float) -> None:
        """`fraction` of the run done, the step, the mean losses of late, the speed in images a second."""
        if not self.shown:
            return
        values = " ".join(f"{name} {losses[name]:.2f}" for name in SHOWN)
        pace = f"step {step}  {speed:.0f} images/s"
        if self.bar is not None:
            self.bar.losses = values
            self.bar.update(self.bar.task_ids[0], completed=fraction, description=pace)
        elif time.monotonic() - self.said >= LINE_EVERY:
            self.said = time.monotonic()
            print(f"{100 * fraction:3.0f} %  {pace}  {values}", flush=True)
