"""deltanet-ref pretrain: a new small Qwen3.5 from a text, every parameter trained by the hand-written backward."""
import json
import math
import os
import time
from itertools import islice
from pathlib import Path

import numpy as np

from deltanet_ref.backends import BACKENDS, get_backend, threads
from deltanet_ref.errors import InputError
from deltanet_ref.formats.files import ensure_writable, read_text
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
from deltanet_ref.train.batches import Example, pack
from deltanet_ref.train.data import end_token
from deltanet_ref.train.initial import new_model
from deltanet_ref.train.loop import EvalRecord, fit
from deltanet_ref.train.memory import keep_freed_memory
from deltanet_ref.train.parallel import ParallelModel
from deltanet_ref.train.report import Console, format_count
from deltanet_ref.train.schedule import schedule

TYPES = {name: CHOICES[name] for name in ("f32", "f16", "q8_0")}        # what --type makes of the matrices
ADAM_BETAS = (0.9, 0.95)
FINAL_RATE = 0.1                # of the peak learning rate, at the end of the cosine
TIMED_BATCHES = 3               # that decide how many steps --minutes gives

EPILOG = """\
CORPUS is UTF-8 text; a blank line separates documents. The tokenizer is Hugging Face's tokenizer.json, with
tokenizer_config.json (its eos_token ends a document) and chat_template.jinja beside it.

example (bench/tiny_model/README.md tells how the model of `deltanet-ref demo` was made):
  deltanet-ref pretrain training.txt --tokenizer tokenizer/ --valid held-out.txt -o tiny.gguf --type q8_0 --minutes 30
"""

# flag, type, default, least value, help
OPTIONS = (
    ("--batch-size", int, 8, 1, "sequences to a step"),
    ("--seq-len", int, 512, 2, "tokens of a sequence"),
    ("--lr", float, 3e-3, 1e-9, "peak learning rate; it falls to a tenth by a cosine"),
    ("--warmup", int, 100, 0, "steps in which it rises to the peak"),
    ("--weight-decay", float, 0.1, 0, "of the matrices"),
    ("--dropout", float, 0.0, 0, "part of the features that a sequence does without, in training"),
    ("--clip", float, 1.0, 1e-9, "limit of the gradient's norm"),
    ("--seed", int, 0, 0, "of the weights and of the order of the text"),
    ("--eval-every", int, 200, 0, "steps between measurements on --valid, 0 for only the first and last"),
    ("--save-every", int, 200, 0, "steps between saves of the unfinished model, 0 for none"),
    ("--log-every", int, 20, 1, "steps between log lines"),
    ("--threads", int, os.cpu_count(), 1, "threads that share a batch"),
    ("--hidden", int, 256, 1, "width of the residual stream"),
    ("--layers", int, 4, 1, "blocks; every fourth is softmax attention"),
    ("--ffn", int, 512, 1, "width of the feed-forward"),
    ("--heads", int, 4, 1, "attention heads"),
    ("--kv-heads", int, 2, 1, "key/value heads of attention"),
    ("--head-dim", int, 64, 1, "features of an attention head"),
    ("--delta-key-heads", int, 4, 1, "key heads of the delta rule"),
    ("--delta-value-heads", int, 8, 1, "value heads of the delta rule"),
    ("--delta-head-dim", int, 32, 1, "features of a delta head, key and value"),
    ("--conv-kernel", int, 4, 1, "taps of the causal convolution"),
    ("--rope-theta", float, 1e4, 1, "base of the rotary frequencies"),
    ("--rotary", float, 0.25, 0, "part of an attention head that is rotated"),
    ("--context", int, 2048, 2, "longest sequence that the file says it takes"),
)


# ---- documents and batches

def encode_documents(text, tokenizer):
    """The documents of a text, a blank line between them: int32 arrays, the end token, the text, the end token."""
    end = end_token(tokenizer)
    parts = (part.strip("\n") for part in text.split("\n\n"))
    return [np.array([end, *tokenizer.encode(part), end], np.int32) for part in parts if part]


def windows(documents, seq_len):
    """Examples of at most seq_len tokens that predict every token of every document once.

    The first token of a window is the last of the one before it: what the first prediction starts from.
    """
    return [Example(document[start:start + seq_len], document[start:start + seq_len], "")
            for document in documents for start in range(0, len(document) - 1, seq_len - 1)]


def stream_batches(documents, batch_size, seq_len, seed):
    """Batches without end of batch_size sequences of exactly seq_len tokens.

    An epoch lays all documents end to end, one end token between two, in an order and from an offset of its own, drawn
    from (seed, epoch); it cuts the stream into sequences and shuffles these. What fills no whole batch is left out.
    """
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        stream = np.concatenate([documents[i][:-1] for i in rng.permutation(len(documents))])
        starts = rng.permutation(np.arange(rng.integers(seq_len), len(stream) - seq_len + 1, seq_len))
        if len(starts) < batch_size:
            raise InputError(f"the corpus has {len(stream)} tokens, too few for a batch of {batch_size} sequences of "
                             f"{seq_len}: lower --batch-size or --seq-len")
        for first in range(0, len(starts) - batch_size + 1, batch_size):
            sequences = [stream[start:start + seq_len] for start in starts[first:first + batch_size]]
            yield pack([Example(tokens, tokens, "") for tokens in sequences])
        epoch += 1


# ---- the file

def write_model(path, model, type, about):
    """Write the GGUF: matrices in `type` (a key of TYPES), vectors and the convolution in F32.

    about: further metadata (general.name, the tokenizer's keys). The file appears only when it is whole.
    """
    metadata = model.config.to_gguf_metadata() | {
        "general.file_type": int(TYPES[type][1]), "general.quantization_version": 2} | about
    write_gguf(path, metadata, stored_tensors(model.weights, type))


def stored_tensors(weights, type):
    """name -> what write_gguf takes. Raises InputError when a matrix cannot be stored in this type."""
    matrices = TYPES[type][0]
    return {name: (quantize(w, matrices), matrices, w.shape) if is_matrix(name, w) else np.asarray(w, np.float32)
            for name, w in weights.items()}


def is_matrix(name, w):
    """Whether a tensor is multiplied with (so it is quantised, and decayed), or is a vector or the convolution."""
    return w.ndim == 2 and not name.endswith("ssm_conv1d.weight")


# ---- the command

def add_arguments(parser):
    parser.epilog = EPILOG
    parser.add_argument("corpus", metavar="CORPUS.txt", type=Path, help="the text to learn")
    parser.add_argument("--tokenizer", required=True, type=Path, help="tokenizer.json, or the directory that holds it")
    parser.add_argument("--valid", metavar="TEXT.txt", type=Path, help="held-out text, to measure on")
    parser.add_argument("-o", "--output", required=True, metavar="MODEL.gguf", type=Path, help="where the model goes")
    parser.add_argument("--type", choices=TYPES, default="f32", help="of its matrices (default f32)")
    parser.add_argument("--name", default="tiny", help="general.name of the file (default tiny)")
    parser.add_argument("--description", default="", help="general.description of the file")
    parser.add_argument("--license", default="", help="general.license of the file")
    parser.add_argument("--start", metavar="MODEL.gguf", type=Path, help="go on from this model instead of a new one")
    parser.add_argument("--backend", choices=BACKENDS, default="numba", help="what computes it (default numba)")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--minutes", type=float, help="as many steps as fit in this time, judged by the first batches")
    for flag, kind, default, _, text in OPTIONS:
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default {default})")


def run(args):
    check(args)
    directory = args.tokenizer.parent if args.tokenizer.is_file() else args.tokenizer
    tokenizer = Tokenizer.from_hf(directory)
    config = make_config(args, tokenizer.vocab_size)
    backend = get_backend(args.backend)
    weights = start_weights(args.start, config, backend) if args.start else new_model(config, args.seed, backend)
    model = Qwen35(config, weights, tokenizer=tokenizer)
    stored_tensors(model.weights, args.type)        # refuses a type that does not fit now, not at the end
    end = end_token(tokenizer)
    about = {f"general.{key}": getattr(args, key) for key in ("name", "description", "license") if getattr(args, key)}
    about |= tokenizer_metadata(json.loads((directory / "tokenizer.json").read_text("utf-8")), tokenizer.chat_template)
    about |= {"tokenizer.ggml.eos_token_id": end, "tokenizer.ggml.padding_token_id": end}

    documents = encode_documents(read_corpus(args.corpus), tokenizer)
    valid = read_corpus(args.valid) if args.valid else ""
    examples = windows(encode_documents(valid, tokenizer), args.seq_len)
    console = Console()
    console.line(f"{format_count(sum(w.size for w in model.weights.values()))} parameters, {len(documents)} documents, "
                 f"{sum(map(len, documents)):,} tokens")

    keep_freed_memory()
    with threads(model.backend, 1):                 # of the operators: the sequences are what is shared out
        parallel = ParallelModel(model, args.threads, args.dropout, args.seed)
        batches = stream_batches(documents, args.batch_size, args.seq_len, args.seed)
        timed = stream_batches(documents, args.batch_size, args.seq_len, args.seed)
        steps = args.steps or steps_in(60 * args.minutes, parallel, islice(timed, TIMED_BATCHES))
        bits_per_nat = sum(example.kept for example in examples) / math.log(2) / max(byte_count(valid), 1)

        def log(record):
            console.log(record)
            if isinstance(record, EvalRecord):
                console.line(f"Iter {record.iteration}: {record.loss * bits_per_nat:.4f} bits per byte on {args.valid}")

        def save():
            parallel.update_decay()
            write_model(args.output, model, args.type, about)

        with console.running(steps):
            history = fit(
                parallel.parameters, parallel.loss_and_grads, batches, steps=steps,
                optimizer=AdamW(betas=ADAM_BETAS, weight_decay=args.weight_decay, decays=is_matrix,
                                backend=model.backend),
                schedule=schedule("cosine", args.lr, steps, min(args.warmup, steps), FINAL_RATE), clip=args.clip,
                evaluate=(lambda: parallel.evaluate(examples, args.batch_size)) if examples else None,
                eval_every=args.eval_every, log_every=args.log_every, on_log=log, on_step=console.step,
                save=save, save_every=args.save_every)
        save()
    print(f"Saved {args.output} ({os.path.getsize(args.output) / 1e6:.2f} MB) after {len(history.losses)} steps, "
          f"{history.tokens:,} tokens, {history.seconds:.0f} s")
    return 130 if history.interrupted else 0


def check(args):
    """Refuse what cannot work before any work. Raises InputError."""
    for flag, _, _, least, _ in OPTIONS:
        value = getattr(args, flag[2:].replace("-", "_"))
        if not least <= value < math.inf:
            raise InputError(f"{flag} is {value}, it must be at least {least}")
    if (args.steps if args.minutes is None else args.minutes) <= 0:
        raise InputError("--steps or --minutes must be above 0")
    if args.dropout >= 1:
        raise InputError(f"--dropout is {args.dropout}, it must be below 1")
    if args.seq_len > args.context:
        raise InputError(f"--seq-len is {args.seq_len}, more than --context {args.context}: lower it")
    ensure_writable(args.output)


def make_config(args, vocab_size):
    """The Config of these arguments; embeddings are tied. Raises InputError that lists all that is wrong."""
    pairs = int(args.head_dim * args.rotary) // 2               # shared out among t, h and w as evenly as can be
    return Config(
        vocab_size=vocab_size, hidden_size=args.hidden, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=args.head_dim,
        linear_num_key_heads=args.delta_key_heads, linear_num_value_heads=args.delta_value_heads,
        linear_key_head_dim=args.delta_head_dim, linear_value_head_dim=args.delta_head_dim,
        linear_conv_kernel_dim=args.conv_kernel, rms_norm_eps=1e-6, rope_theta=args.rope_theta,
        partial_rotary_factor=args.rotary, mrope_section=((pairs + 2) // 3, (pairs + 1) // 3, pairs // 3),
        layer_types=tuple("full_attention" if i % 4 == 3 else "linear_attention" for i in range(args.layers)),
        tie_word_embeddings=True, max_position_embeddings=args.context)


def start_weights(path, config, backend):
    """The tensors of a GGUF model of this shape, dense float32 arrays that training may change. Raises InputError."""
    theirs, weights, _ = weights_from_gguf(read_gguf(path), "float32", backend)
    if expected_tensors(theirs) != expected_tensors(config):
        raise InputError(f"--start {path}: is a model of another shape than these options give")
    return Weights(config, {name: np.array(w) for name, w in weights.items()}, "float32", backend)


def steps_in(seconds, parallel, batches):
    """How many steps fit in so many seconds, by the fastest of these batches; at least one."""
    times = []
    for batch in batches:
        start = time.perf_counter()
        parallel.loss_and_grads(batch)
        times.append(time.perf_counter() - start)
    return max(1, int(seconds / min(times)))


def read_corpus(path):
    """A UTF-8 text file with something in it. Raises InputError."""
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: is empty")
    return text


def byte_count(text):
    """Bytes of the documents of a text, the blank lines between them left out."""
    return sum(len(part.strip("\n").encode()) for part in text.split("\n\n"))
