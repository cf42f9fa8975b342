"""Ways from a base model and an adapter to a small model, compared: quantise below the adapter, after or before it."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from deltanet_ref.errors import InputError
from deltanet_ref.formats.files import atomic_write
from deltanet_ref.formats.quants import stored_bytes
from deltanet_ref.lora.adapter import load_adapter, new_adapter
from deltanet_ref.lora.merge import merge
from deltanet_ref.model.convert import open_base, write_base
from deltanet_ref.train.evaluate import Evaluation, evaluate
from deltanet_ref.train.lora import train
from deltanet_ref.train.report import Silent, load_matplotlib

BATCH_SIZE = 4  # examples per batch in the evaluations


class Route(NamedTuple):
    """One way and its result."""

    name: str
    bytes: int  # of the tensors of the model and of an adapter used at run time
    evaluation: Evaluation


def compare_routes(
    load,
    base: str,
    adapter: str,
    scale: float,
    examples,
    directory: Path | str,
    *,
    type: str,
    training=None,
    console=None,
    **options,
) -> list[Route]:
    """Evaluate the base and the quantised base, each alone and with the adapter, then the merged and quantised model,
    then an adapter trained on the quantised base.

    load       path of a model -> Qwen35
    base       a GGUF file or HF directory
    adapter    a GGUF adapter or PEFT directory, multiplied by scale
    examples   Qwen35 -> list of Example to evaluate on
    directory  an existing directory, for base-TYPE.gguf, merged-TYPE.gguf and the adapter trained-TYPE.gguf
    type       a key of model.convert.CHOICES
    training   data for train, or None to leave out the last route. The new adapter has the (largest) rank, the alpha
               and the targets of the given one; options are those of train
    returns    a Route for each model, in that order
    raises     InputError; Diverged if the training diverges; KeyboardInterrupt if Ctrl-C ended it
    """
    console, routes = console or Silent(), []

    def measure(name, model, live=None):
        weights = model.weights
        held = sum(stored_bytes(weights.stored_type(tensor), weights.shape(tensor)) for tensor in weights)
        held += sum(x.nbytes for x in live.tensors.values()) if live else 0
        routes.append(Route(name, held, evaluate(model, examples(model), BATCH_SIZE)))
        console.line(f"{name}: loss {routes[-1].evaluation.loss:.4f}")

    whole = load(base)
    given = load_adapter(adapter, whole)
    if "invocation_tokens" in given.metadata:
        raise InputError(f"{adapter}: is an activated LoRA, which cannot be merged, so there is nothing to compare")
    kind = Counter(whole.weights.stored_type(target).name for target in given.targets).most_common(1)[0][0].lower()
    measure(f"{kind} base", whole)
    whole.attach(given, scale)
    measure(f"{kind} base + adapter", whole, given)
    del whole

    paths = {name: Path(directory) / f"{name}-{type}.gguf" for name in ("base", "merged", "trained")}
    write_base(open_base(base), paths["base"], type)
    merge(base, [(adapter, scale)], paths["merged"], type)
    quantised = load(paths["base"])
    measure(f"{type} base", quantised)
    name = quantised.attach(load_adapter(adapter, quantised), scale)
    measure(f"{type} base + adapter", quantised, given)
    quantised.detach(name)
    measure(f"merged, then {type}", load(paths["merged"]))
    if training is not None:
        rank = max(map(given.rank, given.targets))
        trained = new_adapter(quantised, rank, given.alpha, given.targets, options.get("seed", 0))
        if train(quantised, trained, training, console=console, **options).interrupted:
            raise KeyboardInterrupt
        trained.save_gguf(paths["trained"])
        measure(f"{type} base + adapter trained on it", quantised, trained)
    return routes


def as_markdown(routes: list[Route]) -> str:
    """A table; its last column is the difference to the loss of the second route, which is not quantised."""
    rows = [("route", "loss, nats per token", "bits per byte", "MB", "against unquantised")]
    unquantised = routes[1].evaluation.loss
    rows += [
        (
            route.name,
            f"{route.evaluation.loss:.4f}",
            f"{route.evaluation.bits_per_byte:.4f}",
            f"{route.bytes / 1e6:.2f}",
            f"{route.evaluation.loss - unquantised:+.4f}",
        )
        for route in routes
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def save_plot(routes: list[Route], path: Path | str) -> None:
    """Plot a bar for each quantised route: its loss above that of the second route (matplotlib, PNG)."""
    base, adapted, _, *small = routes
    figure = load_matplotlib()(figsize=(8, 1.4 + 0.5 * len(small)), layout="constrained")
    axes = figure.add_subplot(
        title=f"{adapted.name}: {adapted.evaluation.loss:.4f} nats per token (without it {base.evaluation.loss:.4f})",
        xlabel=f"loss above that of {adapted.name} (nats per token)",
    )
    above = [route.evaluation.loss - adapted.evaluation.loss for route in small]
    bars = axes.barh([f"{route.name}\n{route.bytes / 1e6:.2f} MB" for route in small], above, height=0.6)
    axes.bar_label(bars, [f"{loss:+.4f}" for loss in above], padding=3)
    axes.axvline(0, color="black", lw=1)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
