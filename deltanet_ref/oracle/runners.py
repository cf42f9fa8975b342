"""Runners, which apply an implementation to a case: Python callables in this or another process, a program, or files.

Each runner has run(case, inputs, layout) -> Answer, and provenance, a text that identifies what was actually run.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import os
import pickle
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError, InternalError, shown
from deltanet_ref.oracle.cases import Case
from deltanet_ref.oracle.exchange import FORMATS, read_answers, write_case
from deltanet_ref.oracle.layouts import Layout, backward_call, call_with, forward_call, returned
from deltanet_ref.oracle.operators import OPERATORS, held_in, in_dtype

ALWAYS_FLOAT32 = ("g", "S0", "dS_end", "A_log", "dt_bias", "dg", "S")  # even when the inputs are bfloat16
START_SECONDS = 180  # for the import, which may compile kernels


class Answer(NamedTuple):
    """What an implementation returned for one case."""

    outputs: dict | None  # name -> NumPy array, in the implementation's layout
    status: str = "ok"  # or ERROR, TIMEOUT, MISSING, SKIP when there are no outputs
    message: str = ""
    device: str = ""  # where the outputs were computed, according to the arrays


# ------------------------------------------------------------------------------------------------- kinds of arrays
#
# array(x, dtype) converts from NumPy, numpy(x) back; device(x) describes where x lives; gradients(...) uses the
# framework's autodiff: see TorchArrays.


class NumpyArrays:
    """NumPy: float32 or float64; bfloat16 values are passed in float32 arrays."""

    def __init__(self, device):
        if device not in (None, "cpu"):
            raise InputError(f"`device` is {shown(device)}; NumPy arrays have none: use `array` torch, jax or cupy")

    def array(self, x, dtype):
        return np.array(x, np.float32 if dtype == "bfloat16" else dtype)

    def numpy(self, x):
        return np.asarray(x)

    def device(self, x):
        return f"numpy {np.__version__}"

    def gradients(self, function, inputs, names, incoming):
        raise InputError("autograd as the backward needs a framework: use `array` torch or jax")


class CupyArrays(NumpyArrays):
    """CuPy; bfloat16 as for NumPy."""

    def __init__(self, device):
        import cupy

        self.cupy = cupy

    def array(self, x, dtype):
        return self.cupy.asarray(super().array(x, dtype))

    def numpy(self, x):
        return self.cupy.asnumpy(x)

    def device(self, x):
        return f"cupy {self.cupy.__version__} on {x.device}"


class TorchArrays:
    """PyTorch tensors, including bfloat16, on the given device (default cpu)."""

    def __init__(self, device):
        import torch

        self.torch, self.where = torch, device or "cpu"

    def array(self, x, dtype):
        return self.torch.from_numpy(np.array(x)).to(self.where, getattr(self.torch, dtype))

    def numpy(self, x):
        if not isinstance(x, self.torch.Tensor):
            return np.asarray(x)
        x = x.detach()
        return (x.float() if x.dtype in (self.torch.bfloat16, self.torch.float16) else x).cpu().numpy()

    def device(self, x):
        return f"torch {self.torch.__version__} on {getattr(x, 'device', 'cpu')}"

    def gradients(self, function, inputs, names, incoming):
        """Gradients of sum(output * incoming gradient) with respect to the named inputs; zeros for an unused input.

        function  inputs -> {output name: array}; incoming  {output name: incoming gradient}
        """
        inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in names}
        with self.torch.enable_grad():
            outputs = function(inputs)
            loss = sum(
                (outputs[name] * d).sum()
                for name, d in incoming.items()
                if getattr(outputs.get(name), "requires_grad", False)
            )
        if not isinstance(loss, self.torch.Tensor):
            raise RuntimeError("autograd finds no path from the outputs to the inputs: were they detached?")
        found = self.torch.autograd.grad(loss, [inputs[name] for name in names], allow_unused=True)
        return {name: self.torch.zeros_like(inputs[name]) if d is None else d for name, d in zip(names, found)}


class JaxArrays:
    """JAX arrays on the given device (cpu, gpu, tpu); float64 sets jax_enable_x64."""

    def __init__(self, device):
        import jax

        self.jax, self.where = jax, jax.devices(device)[0] if device else None

    def array(self, x, dtype):
        if dtype == "float64":
            self.jax.config.update("jax_enable_x64", True)
        return self.jax.device_put(self.jax.numpy.asarray(x, dtype), self.where)

    def numpy(self, x):
        return np.asarray(x, np.float32) if getattr(x, "dtype", None) == self.jax.numpy.bfloat16 else np.asarray(x)

    def device(self, x):
        return f"jax {self.jax.__version__} on {', '.join(map(str, x.devices())) if hasattr(x, 'devices') else 'cpu'}"

    def gradients(self, function, inputs, names, incoming):
        def outputs_of(chosen):
            outputs = function(inputs | chosen)
            return {name: outputs[name] for name in incoming}

        outputs, vjp = self.jax.vjp(outputs_of, {name: inputs[name] for name in names})
        (found,) = vjp({name: self.jax.numpy.asarray(d, outputs[name].dtype) for name, d in incoming.items()})
        return found


ARRAYS = {"numpy": NumpyArrays, "torch": TorchArrays, "jax": JaxArrays, "cupy": CupyArrays}


# ------------------------------------------------------------------------------------------------ Python callables


class Callables:
    """Calls forward and backward in this process. backward: a callable, "autograd", or None."""

    def __init__(self, forward, backward=None, *, array="numpy", device=None, dtype="float32"):
        self.forward, self.backward, self.dtype = forward, backward, dtype
        self.arrays = ARRAYS[array](device)
        self.provenance = ", ".join(source_of(f) for f in (forward, backward) if callable(f))

    def run(self, case: Case, inputs: dict, layout: Layout) -> Answer:
        op = OPERATORS[case.op]
        if case.op == "qwen35":
            return Answer(None, "SKIP", "whole models are tested as programs or files; in Python, use trace and diff")
        try:
            outputs, device = self._forward(op, inputs, layout)
            if self.backward is not None:
                outputs |= self._backward(op, inputs, layout)
        except InputError:
            raise
        except Exception as error:  # an exception of the callable is the verdict
            return Answer(None, "ERROR", f"{_one_line(error)} ({_location(error)})")
        try:
            outputs = {name: self.arrays.numpy(value) for name, value in outputs.items() if value is not None}
        except Exception as error:
            return Answer(None, "ERROR", f"an output is not an array: {_one_line(error)}")
        if objects := [name for name, value in outputs.items() if value.dtype.kind == "O"]:
            return Answer(None, "ERROR", f"{objects[0]} is not an array of numbers")
        return Answer(outputs, device=device)

    def _forward(self, op, inputs, layout):
        given = self._arrays(inputs)
        positional, keywords = call_with(forward_call(layout, op, given), given)
        result = self.forward(*positional, **keywords)
        outputs = _by_name(result, returned(layout.returns, op.outputs))
        first = next((value for value in outputs.values() if value is not None), None)
        return outputs, self.arrays.device(first)

    def _backward(self, op, inputs, layout):
        if self.backward == "autograd":
            given = self._arrays(inputs)

            def function(x):
                positional, keywords = call_with(forward_call(layout, op, x), x)
                return _by_name(self.forward(*positional, **keywords), returned(layout.returns, op.outputs))

            incoming = {output: given[d] for output, d in zip(op.outputs, op.incoming)}
            found = self.arrays.gradients(function, given, [name[1:] for name in op.gradients], incoming)
            return {f"d{name}": d for name, d in found.items()}
        given = self._arrays(inputs)
        positional, keywords = call_with(backward_call(layout, op, given), given)
        return _by_name(self.backward(*positional, **keywords), returned(layout.gradients, op.gradients))

    def _arrays(self, inputs):
        """New arrays for each call, so that the callee may overwrite its arguments. Integers stay integers."""
        wide = held_in(self.dtype)
        return {
            name: value
            if not isinstance(value, np.ndarray)
            else self.arrays.array(value, wide if name in ALWAYS_FLOAT32 else self.dtype)
            if value.dtype.kind == "f"
            else self.arrays.array(value, str(value.dtype))
            for name, value in inputs.items()
        }


def _one_line(error):
    """An exception's type and the first 200 characters of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' * (len(text) > 200)}"


def _by_name(result, names):
    """A returned tuple as name -> array; a dict after the last name holds intermediates. "_" is ignored."""
    values = list(result) if isinstance(result, (tuple, list)) else [result]
    out = {name: value for name, value in zip(names, values) if name != "_"}
    if len(values) > len(names) and isinstance(values[len(names)], dict):
        out |= {name: value for name, value in values[len(names)].items() if name not in out}
    return out


def load_callable(spec: str) -> Callable:
    """Import "module:function" or "path/file.py:function"; modules may be in the working directory.

    Raises InputError with the reason if that fails.
    """
    module_name, _, function = spec.rpartition(":")
    if not module_name or not function:
        raise InputError(f"{shown(spec)} does not name a function: write module:function or path/to/file.py:function")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name).resolve()
            module_spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(module_spec)
            sys.path.insert(0, str(path.parent))
            sys.modules[path.stem] = module
            module_spec.loader.exec_module(module)
        else:
            if os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())
            module = importlib.import_module(module_name)
        target = module
        for part in function.split("."):
            target = getattr(target, part)
    except BaseException as error:  # including the module's SystemExit
        raise InputError(f"{spec} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(target):
        raise InputError(f"{spec} has type {type(target).__name__} and is not a function")
    return target


def source_of(function: Callable) -> str:
    """ "module.function (file:line)", or just the name if the source is unknown."""
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
    try:
        plain = inspect.unwrap(function)
        return f"{name} ({inspect.getsourcefile(plain)}:{inspect.getsourcelines(plain)[1]})"
    except (TypeError, OSError):
        return name


def _location(error):
    """File and line of the innermost frame of the traceback; if that is this file, the call itself did not fit."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if frame.filename == __file__:
        return "in the call itself: declare the layout or the call that it expects"
    return f"{Path(frame.filename).name}:{frame.lineno}"


# ------------------------------------------------------------------------------------------- in a separate process


class Worker:
    """Callables in a child process, which is restarted after a case that exceeds the timeout (seconds) or kills it.

    Raises InputError if a callable cannot be imported.
    """

    def __init__(self, forward, backward=None, *, array=None, device=None, dtype="float32", timeout=20.0):
        self.setup = dict(forward=forward, backward=backward, array=array, device=device, dtype=dtype)
        self.timeout = timeout
        self.process = None
        self._start()

    def _start(self):
        path = os.pathsep.join(filter(None, sys.path))  # the same import path as this process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deltanet_ref.oracle.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=os.name == "posix",
            env=os.environ | {"PYTHONPATH": path},
        )
        self.replies = queue.SimpleQueue()
        threading.Thread(target=_read_replies, args=(self.process.stdout, self.replies), daemon=True).start()
        reply = self._ask(self.setup, START_SECONDS)
        if not isinstance(reply, dict):
            self.close()
            if isinstance(reply, InputError):
                raise reply
            reason = f"the process ended ({reply})" if reply else f"it took more than {START_SECONDS} s"
            raise InputError(f"{self.setup['forward']} cannot be imported: {reason}")
        self.provenance, self.array = reply["provenance"], reply["array"]

    def run(self, case: Case, inputs: dict, layout: Layout) -> Answer:
        if self.process is None:
            self._start()
        reply = self._ask((case, inputs, layout), self.timeout)
        if isinstance(reply, (InputError, InternalError)):
            raise reply
        if isinstance(reply, Answer):
            return reply
        if reply is None:
            answer = Answer(None, "TIMEOUT", f"no answer in {self.timeout:g} s")
        else:
            answer = Answer(None, "ERROR", f"the process died ({reply})")
        self.close()
        return answer

    def _ask(self, question, seconds):
        """The reply; None after a timeout; the exit reason as a text if the process died."""
        try:
            pickle.dump(question, self.process.stdin)
            self.process.stdin.flush()
            reply = self.replies.get(timeout=seconds)
        except queue.Empty:
            return None
        except OSError:
            reply = EOFError
        return _exit_reason(self.process) if reply is EOFError else reply

    def close(self):
        if self.process is not None:
            _kill(self.process)
            with contextlib.suppress(BrokenPipeError):  # closing flushes what was not read
                self.process.stdin.close()
            self.process = None


def _read_replies(stream, replies):
    try:
        while True:
            replies.put(pickle.load(stream))
    except (EOFError, pickle.UnpicklingError, OSError, ValueError):
        replies.put(EOFError)


def _kill(process):
    """Kill the process and its children (its process group), and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # already ended
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
    process.wait()


def _exit_reason(process):
    status = process.wait()
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


# ---------------------------------------------------------------------------------------------- programs and files


class Program:
    """A command with {in} and {out}, run once per case: files of the given format. timeout: seconds per case."""

    def __init__(self, command, *, format="safetensors", timeout=20.0, dtype="float32"):
        try:
            self.words = shlex.split(command)
        except ValueError as error:
            raise InputError(f"the command {shown(command)} cannot be parsed: {error}") from error
        if not any("{in}" in word for word in self.words) or not any("{out}" in word for word in self.words):
            raise InputError(
                f"the command {shown(command)} must contain {{in}} and {{out}}, the files to read and to write"
            )
        self.format, self.timeout, self.dtype = format, timeout, dtype
        self.directory = tempfile.TemporaryDirectory(prefix="deltanet-ref-")
        self.provenance = _program_facts(self.words)

    def run(self, case: Case, inputs: dict, layout: Layout) -> Answer:
        source, target = (Path(self.directory.name) / f"{name}.{self.format}" for name in ("in", "out"))
        write_case(source, in_dtype(inputs, held_in(self.dtype)))
        target.unlink(missing_ok=True)
        words = [word.replace("{in}", str(source)).replace("{out}", str(target)) for word in self.words]
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=os.name == "posix",
            )
        except OSError as error:
            raise InputError(f"the program {words[0]} cannot be run: {error.strerror}") from error
        try:
            output, _ = process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            return Answer(None, "TIMEOUT", f"no answer in {self.timeout:g} s")
        finally:
            _kill(process)
        if process.returncode:
            last = output.decode("utf-8", "replace").strip().rpartition("\n")[2]
            return Answer(None, "ERROR", f"the program failed ({_exit_reason(process)})" + (last and f": {last}"))
        if not target.exists():
            return Answer(None, "ERROR", "the program wrote no answer: {out} does not exist")
        return _answer_from(target, case, layout)

    def close(self):
        self.directory.cleanup()


class Results:
    """Answers computed elsewhere, as DIRECTORY/CASE-ID.safetensors, .npz or .gguf, such as results/delta/plain.npz."""

    def __init__(self, directory):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise InputError(
                f"{directory}: is not a directory; it must hold one file per case, such as "
                f"{Path(directory) / 'delta' / 'plain.safetensors'}"
            )
        self.provenance = f"files in {self.directory}"

    def run(self, case: Case, inputs: dict, layout: Layout) -> Answer:
        for suffix in FORMATS:
            path = self.directory / f"{case.id}.{suffix}"
            if path.exists():
                return _answer_from(path, case, layout)
        return Answer(None, "MISSING", f"{self.directory / case.id}.safetensors (or .npz, .gguf) does not exist")

    def close(self):
        pass


def _answer_from(path, case, layout):
    try:
        arrays = {name: np.array(value) for name, value in read_answers(path).items()}
    except Exception as error:  # a damaged file is the verdict on this case
        return Answer(None, "ERROR", f"the answer cannot be read: {error}")
    if path.suffix == ".gguf":  # ggml drops leading axes of size 1
        axes = OPERATORS[case.op].outputs | OPERATORS[case.op].gradients
        arrays = {
            name: a.reshape((1,) * (len(axes[name]) - a.ndim) + a.shape) if name in axes else a
            for name, a in arrays.items()
        }
    return Answer(arrays)


def _program_facts(words):
    """The program and the files among its arguments, such as a script, each with the start of its sha256."""
    program = shutil.which(words[0])
    if program is None:
        problem = (
            f"is not executable: chmod +x {words[0]}"
            if Path(words[0]).is_file()
            else f"cannot be found: give its path, such as ./{words[0]}"
        )
        raise InputError(f"the program {words[0]} {problem}")
    files = [Path(program), *(Path(word) for word in words[1:] if Path(word).is_file())]
    return ", ".join(
        f"{path.resolve()} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]})" for path in files
    )
