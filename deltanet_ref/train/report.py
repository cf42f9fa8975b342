"""Output of a training run: log lines (in the format of mlx_lm.lora), progress bar, loss curve, final report."""

import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from deltanet_ref.errors import InputError
from deltanet_ref.formats.files import atomic_write
from deltanet_ref.train.loop import EvalRecord

BLOCKS = " ▁▂▃▄▅▆▇█"


def format_record(record) -> str:
    """The log line of a TrainRecord or an EvalRecord."""
    if isinstance(record, EvalRecord):
        return f"Iter {record.iteration}: Val loss {record.loss:.3f}, Val took {record.seconds:.3f}s"
    return (
        f"Iter {record.iteration}: Train loss {record.loss:.3f}, Learning Rate {record.learning_rate:.3e}, "
        f"It/sec {record.iterations_per_second:.3f}, Tokens/sec {record.tokens_per_second:.3f}, "
        f"Trained Tokens {record.trained_tokens}, Peak mem {record.peak_memory / 1e9:.3f} GB"
    )


def format_trainable(trained: int, total: int) -> str:
    """Trainable parameters: 0.42% (3.19M/755M)"""
    return f"Trainable parameters: {100 * trained / total:.2f}% ({format_count(trained)}/{format_count(total)})"


def format_peaks(peaks: dict[str, int]) -> str:
    """Peak memory: load 0.61 GB, first step 1.42 GB, later steps 1.31 GB; with a GPU also what it held"""
    return "Peak memory: " + ", ".join(f"{phase} {peak / 1e9:.2f} GB" for phase, peak in peaks.items())


def format_count(n: int) -> str:
    """Three significant digits and a letter: 3.19M, 755M, 42."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}" if n < 999.5 * size else f"{n / size:.0f}{letter}"
    return str(n)


@dataclass
class TrainReport:
    """The outcome of a run; .to_dict() is ready for JSON."""

    losses: list  # training loss of each step
    val_losses: list  # [(iteration, loss)]
    steps: int
    tokens: int  # all tokens that went through the model
    trained_tokens: int  # tokens with a label
    seconds: float  # in training steps, without validation
    tokens_per_second: float
    peak_memory: dict  # phase -> bytes: load, first step (includes compiling kernels), later steps; on the device
    trainable_parameters: int
    total_parameters: int
    interrupted: bool  # Ctrl-C ended it early

    def to_dict(self) -> dict:
        return asdict(self)

    def text_plot(self, width: int = 60, height: int = 8) -> str:
        """The loss curve in block characters, with its range on the left."""
        return text_plot(self.losses, width, height)

    def save_plot(self, path: Path | str) -> None:
        """Plot training and validation loss over the iterations with matplotlib; the suffix of path is the format."""
        figure = load_matplotlib()(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="iteration", ylabel="loss (nats per token)")
        axes.plot(range(1, len(self.losses) + 1), self.losses, lw=1, label="train")
        if self.val_losses:
            axes.plot(*zip(*self.val_losses), "o-", label="validation")
        axes.legend()
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=Path(path).suffix[1:])


def load_matplotlib():
    """matplotlib's Figure class, which needs no display. Raises InputError with the install command."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install 'deltanet_ref[plot]'") from None
    return Figure


def text_plot(values, width: int = 60, height: int = 8) -> str:
    """Values as columns of blocks, averaged into at most width columns; the lowest value is one eighth high."""
    n = len(values)
    columns = min(width, n)
    edges = [round(i * n / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    low, high = min(means), max(means)
    eighths = [1 + round((8 * height - 1) * (mean - low) / (high - low or 1)) for mean in means]
    lines = []
    for row in reversed(range(height)):
        label = {height - 1: f"{high:8.3f}", 0: f"{low:8.3f}"}.get(row, " " * 8)
        lines.append(f"{label} | " + "".join(BLOCKS[max(0, min(8, e - 8 * row))] for e in eighths).rstrip())
    return "\n".join(lines + [" " * 9 + "+" + "-" * (columns + 1), " " * 11 + f"iterations 1 to {n}"])


class Silent:
    """The interface of Console; prints nothing."""

    @contextmanager
    def running(self, steps):
        yield

    def line(self, text):
        pass

    def log(self, record):
        pass

    def step(self, iteration, loss):
        pass


class Console(Silent):
    """Log lines on stdout, above a progress bar when stdout is a terminal."""

    def __init__(self):
        self.progress = self.task = None

    @contextmanager
    def running(self, steps):
        """Show a progress bar for this many steps while the block runs."""
        if not sys.stdout.isatty():
            yield
            return
        from rich import progress as rich

        with rich.Progress(
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("loss {task.fields[loss]}"),
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(),
        ) as self.progress:
            self.task = self.progress.add_task("train", total=steps, loss="-")
            yield
        self.progress = None

    def line(self, text):
        if self.progress:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def log(self, record):
        self.line(format_record(record))

    def step(self, iteration, loss):
        if self.progress:
            self.progress.update(self.task, completed=iteration, loss=f"{loss:.3f}")
