"""Training a new small Qwen3.5 on a text: every parameter, by the hand-written backward.

tokenizer = load_tokenizer("tokenizer/")
options = PretrainOptions(steps=1000)
model = starting_model(options, tokenizer)
pretrain(model, text, options)
write_model("tiny.gguf", model, "q8_0", file_metadata("tokenizer/", tokenizer, name="tiny"))
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from deltanet_ref.backends import get_backend, threads
from deltanet_ref.backends.cores import available_cores
from deltanet_ref.backends.interface import Backend
from deltanet_ref.errors import InputError, counted
from deltanet_ref.formats.files import read_json
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from deltanet_ref.formats.quants import quantize
from deltanet_ref.formats.tokenizer import Tokenizer, tokenizer_metadata
from deltanet_ref.model.config import Config
from deltanet_ref.model.convert import CHOICES
from deltanet_ref.model.load import weights_from_gguf
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.model.tensors import expected_tensors
from deltanet_ref.model.weights import Weights
from deltanet_ref.train.adamw import AdamW
from deltanet_ref.train.batches import Batch, Example, pack
from deltanet_ref.train.data import end_token
from deltanet_ref.train.initial import new_model
from deltanet_ref.train.loop import EvalRecord, History, fit
from deltanet_ref.train.lora import check_options
from deltanet_ref.train.parallel import ParallelModel
from deltanet_ref.train.report import Silent, format_count
from deltanet_ref.train.schedule import schedule

TYPES = {name: CHOICES[name] for name in ("f32", "f16", "q8_0")}  # of the matrices in the file
ADAM_BETAS = (0.9, 0.95)
FINAL_RATE = 0.1  # of the peak learning rate, at the end of the cosine
TIMED_BATCHES = 3  # measured to convert minutes into steps


@dataclass(frozen=True)
class PretrainOptions:
    """The options of pretrain, and the shape of the model. Raises InputError for values out of range."""

    steps: int | None = None  # optimizer steps ...
    minutes: float | None = None  # ... or as many as fit in this time, estimated from the first batches
    batch_size: int = 8  # sequences in a step
    seq_len: int = 512  # tokens of a sequence
    lr: float = 3e-3  # peak learning rate; decays to a tenth along a cosine
    warmup: int = 100  # steps of linear warmup
    weight_decay: float = 0.1  # of the matrices
    dropout: float = 0.0  # probability that a sequence does without a feature, in training
    clip: float = 1.0  # maximum norm of the gradient
    seed: int = 0  # of the weights and the order of the text
    eval_every: int = 200  # steps between evaluations on the validation text, 0: only first and last
    save_every: int = 200  # steps between calls of save, 0 for none
    log_every: int = 20  # steps between log lines
    threads: int = available_cores()  # threads that share a batch
    hidden: int = 256  # width of the residual stream
    layers: int = 4  # blocks; every fourth is softmax attention
    ffn: int = 512  # width of the feed-forward
    heads: int = 4  # attention heads
    kv_heads: int = 2  # key/value heads of attention
    head_dim: int = 64  # features of an attention head
    delta_key_heads: int = 4  # key heads of the delta rule
    delta_value_heads: int = 8  # value heads of the delta rule
    delta_head_dim: int = 32  # features of a delta rule head, key and value
    conv_kernel: int = 4  # taps of the causal convolution
    rope_theta: float = 1e4  # base of the rotary frequencies
    rotary: float = 0.25  # fraction of an attention head that is rotated
    context: int = 2048  # context length that the file states, in tokens

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            raise InputError("`steps` and `minutes` both set the length of the run: give one of them")
        check_options(self, OPTION_RULES)
        if self.seq_len > self.context:
            raise InputError(f"`seq_len` is {self.seq_len}, more than `context` {self.context}: lower it")


OPTION_RULES = (
    ("minutes lr clip rope_theta", lambda x: 0 < x < math.inf, "above 0"),
    ("weight_decay", lambda x: 0 <= x < math.inf, "0 or more"),
    ("warmup seed eval_every save_every", lambda x: x >= 0, "0 or more"),
    ("dropout", lambda x: 0 <= x < 1, "at least 0 and below 1"),
    ("rotary", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    ("seq_len context", lambda x: x >= 2, "at least 2"),
    (
        "steps batch_size log_every threads hidden layers ffn heads kv_heads head_dim delta_key_heads "
        "delta_value_heads delta_head_dim conv_kernel",
        lambda x: x >= 1,
        "at least 1",
    ),
)


# ---- documents and batches


def encode_documents(text: str, tokenizer) -> list[np.ndarray]:
    """The documents of a text, separated by blank lines: int32 arrays of end token, text, end token."""
    end = end_token(tokenizer)
    parts = (part.strip("\n") for part in text.split("\n\n"))
    return [np.array([end, *tokenizer.encode(part), end], np.int32) for part in parts if part]


def windows(documents: list[np.ndarray], seq_len: int) -> list[Example]:
    """Examples of at most seq_len tokens that predict every token of every document once.

    The first token of a window is the last of the window before it: the first prediction starts from it.
    """
    return [
        Example(document[start : start + seq_len], document[start : start + seq_len], "")
        for document in documents
        for start in range(0, len(document) - 1, seq_len - 1)
    ]


def stream_batches(documents: list[np.ndarray], batch_size: int, seq_len: int, seed: int) -> Iterator[Batch]:
    """Endless batches of batch_size sequences of exactly seq_len tokens.

    An epoch concatenates all documents, with one end token between two of them, in an order and from an offset drawn
    from (seed, epoch); it cuts this stream into sequences and shuffles them. An incomplete last batch is left out.
    Raises InputError if the documents do not fill one batch.
    """
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        stream = np.concatenate([documents[i][:-1] for i in rng.permutation(len(documents))])
        starts = rng.permutation(np.arange(rng.integers(seq_len), len(stream) - seq_len + 1, seq_len))
        if len(starts) < batch_size:
            raise InputError(
                f"the corpus has {counted(len(stream), 'token')}, too few for a batch of "
                f"{counted(batch_size, 'sequence')} of {seq_len}: lower `batch_size` or `seq_len`"
            )
        for first in range(0, len(starts) - batch_size + 1, batch_size):
            sequences = [stream[start : start + seq_len] for start in starts[first : first + batch_size]]
            yield pack([Example(tokens, tokens, "") for tokens in sequences])
        epoch += 1


def byte_count(text: str) -> int:
    """Bytes of the documents of a text, without the blank lines between them."""
    return sum(len(part.strip("\n").encode()) for part in text.split("\n\n"))


# ---- the model


def starting_model(
    options: PretrainOptions, tokenizer, start: Path | str | None = None, backend: str = "numba"
) -> Qwen35:
    """The model to train, dense float32: a new one, or that of a GGUF file `start`, which must have the same shape.

    Raises InputError: sizes that do not fit together, all of them at once; a file of another shape.
    """
    config = make_config(options, tokenizer.vocab_size)
    ops = get_backend(backend)
    weights = start_weights(start, config, ops) if start else new_model(config, options.seed, ops)
    return Qwen35(config, weights, tokenizer=tokenizer)


def make_config(options: PretrainOptions, vocab_size: int) -> Config:
    """The Config of these options, with tied embeddings. Raises InputError that lists everything wrong."""
    o = options
    pairs = int(o.head_dim * o.rotary) // 2  # divided among t, h and w as evenly as possible
    return Config(
        vocab_size=vocab_size,
        hidden_size=o.hidden,
        intermediate_size=o.ffn,
        num_hidden_layers=o.layers,
        num_attention_heads=o.heads,
        num_key_value_heads=o.kv_heads,
        head_dim=o.head_dim,
        linear_num_key_heads=o.delta_key_heads,
        linear_num_value_heads=o.delta_value_heads,
        linear_key_head_dim=o.delta_head_dim,
        linear_value_head_dim=o.delta_head_dim,
        linear_conv_kernel_dim=o.conv_kernel,
        rms_norm_eps=1e-6,
        rope_theta=o.rope_theta,
        partial_rotary_factor=o.rotary,
        mrope_section=((pairs + 2) // 3, (pairs + 1) // 3, pairs // 3),
        layer_types=tuple("full_attention" if i % 4 == 3 else "linear_attention" for i in range(o.layers)),
        tie_word_embeddings=True,
        max_position_embeddings=o.context,
    )


def start_weights(path: Path | str, config: Config, backend: Backend) -> Weights:
    """The tensors of a GGUF model of this shape, as float32 arrays that training may change. Raises InputError."""
    theirs, weights, _ = weights_from_gguf(read_gguf(path), "float32", backend)
    if expected_tensors(theirs) != expected_tensors(config):
        raise InputError(f"{path}: the model has another shape than these options")
    return Weights(config, {name: np.array(w) for name, w in weights.items()}, "float32", backend)


def matrices(config: Config) -> set[str]:
    """Names of the tensors that are multiplied with: these are quantised and decayed, vectors and convolutions not."""
    return {name for name, spec in expected_tensors(config).items() if spec.is_matrix}


# ---- training


def pretrain(
    model: Qwen35,
    text: str,
    options: PretrainOptions,
    *,
    valid: str = "",
    console=None,
    save: Callable[[], None] | None = None,
) -> History:
    """Train all parameters of a model of starting_model on a text, in place, with AdamW.

    text     documents separated by blank lines
    valid    held-out text to evaluate on, also in bits per byte
    console  a report.Console that shows log lines and progress; None is silent
    save     called every save_every steps; the model then holds the current parameters
    returns  History; the caller saves the final model
    raises   InputError for a text without documents, or too short for one batch; loop.Diverged
    """
    console = console or Silent()
    documents = encode_documents(text, model.tokenizer)
    if not documents:
        raise InputError("the corpus has no documents")
    examples = windows(encode_documents(valid, model.tokenizer), options.seq_len)
    console.line(
        f"{format_count(sum(w.size for w in model.weights.values()))} parameters, "
        f"{counted(len(documents), 'document')}, {sum(map(len, documents)):,} tokens"
    )
    bits_per_nat = sum(example.kept for example in examples) / math.log(2) / max(byte_count(valid), 1)

    def log(record):
        console.log(record)
        if isinstance(record, EvalRecord):
            console.line(f"Iter {record.iteration}: {record.loss * bits_per_nat:.4f} bits per byte of validation text")

    def batches():
        return stream_batches(documents, options.batch_size, options.seq_len, options.seed)

    def save_current():
        parallel.update_decay()
        save()

    with threads(model.backend, 1):  # of the operators: the sequences are distributed instead
        parallel = ParallelModel(model, options.threads, options.dropout, options.seed)
        steps = options.steps or steps_in(60 * options.minutes, parallel, islice(batches(), TIMED_BATCHES))
        decayed = matrices(model.config)
        with console.running(steps):
            history = fit(
                parallel.parameters,
                parallel.loss_and_grads,
                batches(),
                steps=steps,
                optimizer=AdamW(
                    betas=ADAM_BETAS,
                    weight_decay=options.weight_decay,
                    decays=lambda name, w: name in decayed,
                    backend=model.backend,
                ),
                schedule=schedule("cosine", options.lr, steps, min(options.warmup, steps), FINAL_RATE),
                clip=options.clip,
                evaluate=(lambda: parallel.evaluate(examples, options.batch_size)) if examples else None,
                eval_every=options.eval_every,
                log_every=options.log_every,
                on_log=log,
                on_step=console.step,
                save=save and save_current,
                save_every=options.save_every,
            )
        parallel.update_decay()
    return history


def steps_in(seconds: float, parallel: ParallelModel, batches) -> int:
    """The number of steps that fit in this time, estimated from the fastest of these batches; at least one."""
    times = []
    for batch in batches:
        start = time.perf_counter()
        parallel.loss_and_grads(batch)
        times.append(time.perf_counter() - start)
    return max(1, int(seconds / min(times)))


# ---- the file


def write_model(path: Path | str, model: Qwen35, type: str, metadata: dict) -> None:
    """Write a GGUF: matrices in `type`, a key of TYPES; vectors and the convolution in F32.

    metadata: further keys (file_metadata). The file appears only when it is complete.
    """
    keys = {"general.file_type": int(TYPES[type][1]), "general.quantization_version": 2}
    write_gguf(path, model.config.to_gguf_metadata() | keys | metadata, stored_tensors(model, type))


def stored_tensors(model: Qwen35, type: str) -> dict:
    """name -> tensor, as write_gguf takes them. Raises InputError when a matrix cannot be stored in this type."""
    kind, quantised = TYPES[type][0], matrices(model.config)
    return {
        name: (quantize(w, kind), kind, w.shape) if name in quantised else np.asarray(w, np.float32)
        for name, w in model.weights.items()
    }


def file_metadata(directory: Path | str, tokenizer: Tokenizer, **general: str) -> dict:
    """The tokenizer's metadata, from tokenizer.json in a directory, and general.NAME = text for every keyword."""
    end = end_token(tokenizer)
    metadata = tokenizer_metadata(read_json(Path(directory) / "tokenizer.json"), tokenizer.chat_template)
    metadata |= {"tokenizer.ggml.eos_token_id": end, "tokenizer.ggml.padding_token_id": end}
    return {f"general.{key}": text for key, text in general.items() if text} | metadata
