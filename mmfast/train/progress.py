"""Progress on a terminal as a bar, elsewhere as lines."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

LINE_EVERY = 10.0  # seconds, where the output is no terminal
SHOWN = ("image", "text", "speech", "picture", "generator", "discriminator")


class Progress:
    """A context in which `show` tells how far the training is."""

    def __init__(self) -> None:
        console = Console()
        self.bar: RichProgress | None = None
        self.task = None
        self.said = float("-inf")
        if console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
            self.bar = RichProgress(*columns, TextColumn("{task.description}"), console=console)
            self.task = self.bar.add_task("first steps", total=1.0)

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
        shown = " ".join(f"{name} {losses[name]:.3f}" for name in SHOWN if name in losses)
        line = f"step {step}  {shown}  {speed:.0f} images/s"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=fraction, description=line)
        elif time.monotonic() - self.said >= LINE_EVERY:
            self.said = time.monotonic()
            print(f"{100 * fraction:3.0f} %  {line}", flush=True)
