"""Training a LoRA adapter on a frozen model."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from deltanet_ref.errors import InputError, counted, shown
from deltanet_ref.train.adamw import AdamW
from deltanet_ref.train.batches import Example, shuffled
from deltanet_ref.train.data import encode_dataset, read_dataset, sequence_limit
from deltanet_ref.train.evaluate import mean_loss
from deltanet_ref.train.fitting import what_fits
from deltanet_ref.train.loop import fit
from deltanet_ref.train.memory import peak_memory, start_phase
from deltanet_ref.train.report import Silent, TrainReport, format_trainable
from deltanet_ref.train.schedule import SHAPES, schedule

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class TrainOptions:
    """The options of train. Raises InputError for values out of range."""

    steps: int | None = None  # optimizer steps
    epochs: float | None = None  # passes over the data, instead of steps; 1 if neither is given
    batch_size: int = 4  # examples in a batch, packed end to end
    grad_accumulation: int = 1  # batches in an optimizer step
    seq_len: int | None = None  # maximum tokens of an example; None: DEFAULT_SEQ_LEN or the model's context
    truncate: bool = False  # cut longer examples instead of refusing them
    checkpoint: bool = False  # gradient checkpointing: less memory, every block's forward runs twice
    mask_prompt: bool = True  # train on completions and answers only
    lr: float = 2e-4  # peak learning rate
    warmup: int = 0  # steps of linear warmup
    schedule: str = "cosine"  # of schedule.SHAPES: decay after warmup
    weight_decay: float = 0.0  # of AdamW
    clip: float = 1.0  # maximum norm of the gradient, 0 for no limit
    seed: int = 0  # of the order of examples and the validation split
    val_fraction: float = 0.0  # fraction of the rows held out for validation where there is no valid.jsonl
    eval_every: int = 100  # steps between validations, 0 for only the first and last
    log_every: int = 10  # steps between log lines
    save_every: int = 0  # steps between calls of save, 0 for none

    def __post_init__(self):
        check_options(self, OPTION_RULES)
        if self.steps is not None and self.epochs is not None:
            raise InputError("`steps` and `epochs` both set the length of the run: give one")


OPTION_RULES = (
    ("steps batch_size grad_accumulation log_every", lambda x: x >= 1, "at least 1"),
    ("epochs lr", lambda x: 0 < x < math.inf, "above 0"),
    ("warmup weight_decay clip seed eval_every save_every", lambda x: 0 <= x < math.inf, "0 or more"),
    ("val_fraction", lambda x: 0 <= x < 1, "at least 0 and below 1"),
    ("schedule", lambda x: x in SHAPES, f"one of {', '.join(SHAPES)}"),
)


def check_options(options, rules) -> None:
    """Raise InputError for the first attribute of options that breaks a rule; None is not checked.

    rules: (names, value -> whether it holds, the rule in words)
    """
    for names, holds, rule in rules:
        for name in names.split():
            value = getattr(options, name)
            try:
                good = value is None or holds(value)
            except TypeError:  # not a number
                good = False
            if not good:
                raise InputError(f"`{name}` is {shown(value)}, it must be {rule}")


def train(model, adapter, data, *, console=None, save=None, **options) -> TrainReport:
    """Train the adapter on data with AdamW, the base frozen. Its arrays are updated in place and it stays attached.

    data     path (a .jsonl file, or a directory with train.jsonl and optionally valid.jsonl), row dicts, or Examples
    console  a report.Console that shows log lines and progress; None is silent
    save     () -> None, called every save_every steps
    options  fields of TrainOptions
    Raises InputError for bad data or options, before any training; loop.Diverged when the loss is no longer finite.
    """
    unknown = options.keys() - {f.name for f in fields(TrainOptions)}
    if unknown:
        raise InputError(f"unknown options {', '.join(sorted(unknown))}; see TrainOptions")
    options = TrainOptions(**options)
    splits = prepare(read_rows(data), model, options)
    return run(model, adapter, splits, options, console, save)


def read_rows(data) -> dict[str, list]:
    """A path or a list of rows -> split name -> [(source, row)]."""
    if isinstance(data, (str, Path)):
        return read_dataset(data)
    rows = [(f"row {i}", row) for i, row in enumerate(data, 1)]
    if not rows:
        raise InputError("the data contains no rows")
    return {"train": rows}


def prepare(rows: dict[str, list], model, options: TrainOptions) -> dict[str, list[Example]]:
    """Rows of each split -> {"train": Examples, "valid": Examples, possibly none}, checked for length."""
    if "train" not in rows:
        raise InputError("there is no train.jsonl in the directory")
    encode = dict(
        tokenizer=model.tokenizer,
        mask_prompt=options.mask_prompt,
        truncate=options.truncate,
        seq_len=sequence_limit(options.seq_len, model.config.max_position_embeddings, DEFAULT_SEQ_LEN),
    )
    train = encode_dataset(rows["train"], **encode)
    if "valid" in rows:
        return {"train": train, "valid": encode_dataset(rows["valid"], **encode)}
    held_out = math.ceil(options.val_fraction * len(train))
    if held_out == len(train):
        raise InputError(
            f"`val_fraction` {options.val_fraction} holds out {counted(len(train), 'row')}, all of them: lower it"
        )
    order = np.random.default_rng(options.seed).permutation(len(train))
    valid, kept = np.sort(order[:held_out]), np.sort(order[held_out:])
    return {"train": [train[i] for i in kept], "valid": [train[i] for i in valid]}


def run(
    model, adapter, splits: dict[str, list[Example]], options: TrainOptions, console=None, save=None
) -> TrainReport:
    """Train on prepared Examples: the second half of train."""
    peaks = {"load": start_phase()}
    _attach_trainable(model, adapter)
    parameters = adapter.tensors
    trainable = sum(array.size for array in parameters.values())
    total = sum(math.prod(model.weights.shape(name)) for name in model.weights)
    steps = options.steps or steps_of(options.epochs or 1.0, len(splits["train"]), options)
    console = console or Silent()
    console.line(format_trainable(trainable, total))

    keep = "inputs" if options.checkpoint else "products"

    def loss_and_grads(batch):
        try:
            return model.loss_and_grads(batch.tokens, batch.labels, cu_seqlens=batch.cu_seqlens, wrt="lora", keep=keep)
        except MemoryError:
            if model.backend.memory_of is None:
                raise
        # the error has been dropped, and with it the arrays of the step
        raise MemoryError(what_fits(model, batch.tokens.size, keep))

    def evaluate():
        return mean_loss(model, splits["valid"], options.batch_size)

    def on_step(iteration, loss):
        if iteration == 1:
            peaks["first step"] = start_phase()
        console.step(iteration, loss)

    with console.running(steps):
        history = fit(
            parameters,
            loss_and_grads,
            shuffled(splits["train"], options.batch_size, options.seed),
            steps=steps,
            optimizer=AdamW(weight_decay=options.weight_decay, backend=model.backend),
            schedule=schedule(options.schedule, options.lr, steps, options.warmup),
            clip=options.clip or None,
            accumulation=options.grad_accumulation,
            evaluate=evaluate if splits["valid"] else None,
            eval_every=options.eval_every,
            log_every=options.log_every,
            on_log=console.log,
            on_step=on_step,
            save=save,
            save_every=options.save_every,
        )
    if len(history.losses) > 1:
        peaks["later steps"] = peak_memory()
    if model.backend.held_memory is not None:
        peaks["on the device"] = model.backend.held_memory()
    return TrainReport(
        losses=history.losses,
        val_losses=[(e.iteration, e.loss) for e in history.evaluations],
        steps=len(history.losses),
        tokens=history.tokens,
        trained_tokens=history.trained_tokens,
        seconds=history.seconds,
        tokens_per_second=history.tokens / history.seconds,
        peak_memory=peaks,
        trainable_parameters=trainable,
        total_parameters=total,
        interrupted=history.interrupted,
    )


def _attach_trainable(model, adapter):
    """Attach the adapter as the trainable one; if it is attached already it keeps its name and scale."""
    for name, attached in list(model.adapters.items()):
        if attached.adapter is adapter:
            model.detach(name)
            model.attach(adapter, scale=attached.scale, name=name, trainable=True)
            return
    model.attach(adapter, trainable=True)


def steps_of(epochs: float, examples: int, options: TrainOptions) -> int:
    """Optimizer steps in `epochs` passes over the examples; the last step may reach into the next pass."""
    batches = epochs * math.ceil(examples / options.batch_size)
    return max(1, math.ceil(batches / options.grad_accumulation))
