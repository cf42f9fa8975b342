"""Compiles CUDA sources with g++ against cuda.h, and launches their kernels in this process.

    library = compile(code, include_dirs=["kernels"], macros={"REAL": "float"})
    library.launch("rms_norm_forward", grid=8, block=128, args=[x, w, y, np.int32(n)], shared_bytes=512)

A source is compiled once for each content: libraries are kept in the user's cache directory. The three builds:

plain    -O2, to be launched here
thread   ThreadSanitizer: races; run by jobs.py in a process of its own, as is
address  AddressSanitizer and UndefinedBehaviorSanitizer: bounds, alignment, shifts, integer overflow
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    from deltanet_ref.errors import InputError
except ImportError:  # this folder also works by itself

    class InputError(ValueError):
        """Bad input; the text is one line that names the remedy."""


HERE = Path(__file__).parent
HEADERS = ("fiber.h", "cuda.h", "cuda_bf16.h", "ptx.cuh", "library.h")  # what a library is compiled with
COMMON = "-std=c++17 -w -fPIC -fno-strict-aliasing -fno-exceptions -fno-rtti -fno-gnu-unique -fvisibility=hidden"
# fmaf is one instruction where the processor has it; no other products and sums are contracted
NUMBERS = "-march=native -ffp-contract=off"
# The rest of -fsanitize=undefined, and arrays used after their scope, would double the time to compile.
SANITIZERS = "address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
FLAGS = {
    "plain": f"{COMMON} {NUMBERS} -O2",
    "thread": f"{COMMON} {NUMBERS} -O1 -g -fno-var-tracking -fno-omit-frame-pointer -fsanitize=thread",
    "address": f"{COMMON} {NUMBERS} -O1 -g -fno-var-tracking -fno-omit-frame-pointer -fsanitize={SANITIZERS} "
    "-fno-sanitize-address-use-after-scope -fno-sanitize-recover=all",
}
BUILDS = tuple(FLAGS)


class KernelError(RuntimeError):
    """A launch that the emulator ended: divergent threads, a misaligned ldmatrix, too many threads."""


class Site(NamedTuple):
    """A barrier or a wait in the source."""

    file: str
    line: int
    kind: str  # "__syncthreads", "__syncwarp", "cp_async_wait"


class Source(NamedTuple):
    """What a library is compiled from."""

    code: str
    include_dirs: tuple[str, ...]
    macros: tuple[tuple[str, str], ...]
    name: str  # the file's name in messages


# ---- compiling


def compile(
    code: str, include_dirs: Iterable = (), macros: Mapping | None = None, build: str = "plain", name: str = "kernel.cu"
) -> "Library":
    """The library of a CUDA source.

    macros  -D definitions
    build   "plain", "thread" or "address"
    name    of the file, for messages and sites; the source may give it instead, in a first line #line 1 "reverse.cu"

    Raises InputError if there is no g++ or the source does not compile.
    """
    if named := re.match(r'#line 1 "([^"\n]+)"\n', code):
        name, code = named[1], code[named.end() :]
    macros = tuple(sorted((key, str(value)) for key, value in (macros or {}).items()))
    return _compiled(Source(code, tuple(map(str, include_dirs)), macros, name), build)


def compile_source(source: Source, build: str) -> "Library":
    """The same source in another build."""
    return _compiled(source, build)


@functools.cache
def _compiled(source, build):
    files = translate(source)
    definitions = [f"-D{name}={value}" for name, value in source.macros]
    return Library(_built(files, "kernels", ["-shared", *definitions], build), source, build)


def host_program(build: str) -> Path:
    """The program that runs jobs (main.cpp) in this build."""
    return _built({"unit.cpp": (HERE / "main.cpp").read_text()}, "host", ["-ldl"], build)


def _built(files, what, options, build):
    """The path of unit.cpp in `files`, compiled; from the cache if it is there."""
    digest = hashlib.sha256(repr((sorted(files.items()), options, FLAGS[build], _compiler(), _headers())).encode())
    path = cache_directory() / f"{what}-{build}-{digest.hexdigest()[:32]}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        for file, text in files.items():
            Path(directory, file).write_text(text)
        command = ["g++", *FLAGS[build].split(), f"-I{directory}", f"-I{HERE}", f"{directory}/unit.cpp", *options]
        result = subprocess.run([*command, "-o", f"{directory}/out"], capture_output=True, text=True)
        if result.returncode != 0:
            raise InputError(f"g++ cannot compile the kernels ({build}): {_first_errors(result.stderr)}")
        os.replace(f"{directory}/out", path)  # whole, or not there
    return path


def _first_errors(text):
    errors = [line for line in text.splitlines() if "error" in line]
    return " | ".join(errors[:8]) or text[-1500:]


def cache_directory() -> Path:
    """Where libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "deltanet_ref", "cuda-on-cpu")


@functools.cache
def _compiler():
    """The compiler's version, and what -march=native means here."""
    if shutil.which("g++") is None:
        raise InputError("the emulator needs g++: apt install g++")
    command = ["g++", "-march=native", "-E", "-v", "-x", "c++", "/dev/null"]
    return subprocess.run(command, capture_output=True, text=True).stderr


@functools.cache
def _headers():
    return {name: (HERE / name).read_text() for name in HEADERS}


# ---- what the preprocessor cannot do: arrays in shared memory, the list of kernels

DYNAMIC = re.compile(r"extern\s+__shared__\s+((?:__align__\(\d+\)\s*)?)([\w:][\w:\s]*?)\s*\b(\w+)\s*\[\s*\]\s*;")
STATIC = re.compile(
    r"(?:static\s+)?__shared__\s+((?:__align__\(\d+\)\s*)?)([\w:][\w:\s<>,]*?)\s*\b(\w+)\s*((?:\[[^;]*?\])*)\s*;"
)
KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\(((?:[^()]|\([^()]*\))*)\)\s*)?(\w+)\s*\('
)
INCLUDE = re.compile(r'^([ \t]*#[ \t]*include[ \t]*)(["<])([^">]+)[">]', re.MULTILINE)
COMMENT = re.compile(
    r"""'\\?"'|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*\"""", re.DOTALL
)  # or a text, which may contain one
SITE = re.compile(r"\b(__syncthreads|__syncwarp|cp_async_wait)\s*[(<]")


def translate(source: Source) -> dict[str, str]:
    """File name -> text of a source and all that it includes, in C++, with unit.cpp to be compiled."""
    files, names = {}, {}

    def add(name, text, directory):
        """Store a file and what it includes; its name among `files`."""
        stored = f"{len(names)}-{Path(name).name}"
        names[directory, name] = stored
        code = blank_comments(text)

        def include(match):
            path = _find(match[3], directory if match[2] == '"' else None, source.include_dirs)
            if path is None or path.parent == HERE:
                return match[0]
            key = path.parent, match[3]
            return f'{match[1]}"{names.get(key) or add(match[3], path.read_text(), path.parent)}"'

        code = _translate_kernels(code)
        files[stored] = f'#line 1 "{name}"\n{INCLUDE.sub(include, code)}\n'
        return stored

    kernels = sorted({match[2] for match in KERNEL.finditer(blank_comments(source.code))})
    main = add(source.name, source.code, None)
    row = (
        "#ifdef EMULATOR_HAS_{0}\n"
        '    {{"{0}", emulator::Entry<{0}>::types, emulator::Entry<{0}>::run, EMULATOR_HAS_{0}}},\n'
        "#endif\n"
    )
    table = "".join(map(row.format, kernels))
    files["unit.cpp"] = (
        f'#include "cuda.h"\n#include "{main}"\n#line 1 "table"\n'
        f"static const emulator::Kernel emulator_kernels[] = {{\n{table}    {{nullptr, nullptr, nullptr, 0}}}};\n"
        '#include "library.h"\n'
    )
    return files


def blank_comments(text: str) -> str:
    """The text without comments, every line where it was."""

    def blank(match):
        return match[0] if match[0][0] in "'\"" else " " + "\n" * match[0].count("\n")

    return COMMENT.sub(blank, text)


def _find(name, directory, include_dirs):
    """The path of an include, the emulator's own files first; None for a header of the system."""
    for candidate in (HERE, directory, *include_dirs):
        if candidate is not None and Path(candidate, name).is_file() and (candidate != HERE or name in HEADERS):
            return Path(candidate, name)
    return None


def _translate_kernels(code):
    for match in DYNAMIC.finditer(code):
        if int(re.sub(r"\D", "", match[1]) or 1) > 16:
            raise InputError(f"{match[0]}: dynamic shared memory is aligned to 16 bytes, not to more")
    code = DYNAMIC.sub(r"\2* const \3 = emulator::dynamic_shared<\2>();", code)
    code = STATIC.sub(
        r"typedef \1\2 emulator_type_\3\4; static emulator::Slot emulator_slot_\3; "
        r"emulator_type_\3& \3 = emulator_slot_\3.get<emulator_type_\3>(alignof(emulator_type_\3));",
        code,
    )

    def announce(match):
        most = _first_argument(match[1]) if match[1] else "1024"
        line = code.count("\n", 0, match.start()) + 1
        return f"\n#define EMULATOR_HAS_{match[2]} ({most})\n#line {line}\n{match[0]}"

    return KERNEL.sub(announce, code)


def _first_argument(text):
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "(<") - (c in ")>")
        if c == "," and depth == 0:
            return text[:i]
    return text


# ---- launching

CTYPES = {"i": ctypes.c_int32, "u": ctypes.c_uint32, "l": ctypes.c_int64}
WORDS = {"p": "a pointer", "i": "an int", "u": "an unsigned", "l": "a long long", "f": "a float"}
MESSAGE = 2500


class Library:
    """The kernels of a source in one build. Launches of one library in several Python threads wait for each other.

    path    the shared library
    source  what it was compiled from
    """

    recorders: list = []  # called with (library, Launch) before each launch: jobs.py

    def __init__(self, path: Path, source: Source, build: str):
        self.path, self.source, self.build = path, source, build
        self._lock = threading.Lock()

    @functools.cached_property
    def _dll(self):
        if self.build != "plain":
            raise InputError(f"the {self.build} build runs in a process of its own: see emulator/jobs.py")
        dll = ctypes.CDLL(str(self.path))
        dll.emulator_types.restype = ctypes.c_char_p
        dll.emulator_sites.restype = ctypes.c_uint64
        return dll

    @functools.cache  # noqa: B019 - libraries live as long as the process
    def types(self, name: str) -> str:
        """The types of a kernel's arguments, a letter each: p pointer, i int, u unsigned, l long long, f float."""
        types = self._dll.emulator_types(name.encode())
        if types is None:
            raise InputError(f"there is no kernel {name} in {self.source.name}")
        return types.decode()

    def launch(
        self, name: str, grid, block, args, shared_bytes: int = 0, off: Site | None = None, seed: int | None = None
    ):
        """Run a kernel for all blocks.

        grid, block   an int or up to three
        args          arrays (NumPy, in C order), ctypes pointers, None; numbers of NumPy, ctypes or Python
        shared_bytes  of dynamic shared memory
        off           a barrier or wait that does nothing in this launch
        seed          permutes the order in which warps and lanes run; None: natural order

        Raises KernelError when the emulator ends the launch.
        """
        values = arguments(self.types(name), args, name)
        for recorder in self.recorders:
            recorder(self, name, grid, block, args, shared_bytes)
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        triples = [(ctypes.c_uint32 * 3)(*triple(n)) for n in (grid, block)]
        message = ctypes.create_string_buffer(MESSAGE)
        with self._lock:
            failed = self._dll.emulator_launch(
                name.encode(), *triples, ctypes.c_uint64(shared_bytes), pointers, ctypes.c_uint64(seed or 0),
                off.file.encode() if off else None, off.line if off else 0, message, ctypes.c_uint64(MESSAGE),
            )  # fmt: skip
        if failed:
            raise KernelError(f"{name}: {message.value.decode()}")

    @property
    def sites(self) -> list[Site]:
        """The barriers and waits that launches in this process have reached, in order of file and line."""
        with self._lock:
            text = ctypes.create_string_buffer(self._dll.emulator_sites(None, ctypes.c_uint64(0), 0) + 1)
            self._dll.emulator_sites(text, ctypes.c_uint64(len(text)), 0)
        return read_sites(text.value.decode())

    @property
    def unreached(self) -> list[Site]:
        """The barriers and waits of the source itself, not of what it includes, that no launch has reached."""
        reached = {(site.file, site.line) for site in self.sites}
        code = blank_comments(self.source.code)
        written = [
            Site(self.source.name, code.count("\n", 0, match.start()) + 1, match[1]) for match in SITE.finditer(code)
        ]
        return [site for site in written if (site.file, site.line) not in reached]


def read_sites(text: str) -> list[Site]:
    """The sites of emulator_sites()."""
    rows = (line.split("\t") for line in text.splitlines())
    return sorted({Site(file, int(line), kind) for kind, line, file in rows})


def triple(n) -> tuple[int, int, int]:
    """A grid or block as three numbers."""
    return (*map(int, n if isinstance(n, tuple | list) else (n,)), 1, 1)[:3]


def arguments(types: str, args, name: str) -> list:
    """ctypes objects of these types; TypeError for what does not fit."""
    if len(args) != len(types):
        raise TypeError(f"{name} takes {len(types)} arguments, not {len(args)}")
    return [_argument(letter, x, f"argument {i} of {name}") for i, (letter, x) in enumerate(zip(types, args))]


def _argument(letter, x, what):
    value = getattr(x, "value", x)  # of a ctypes number
    if letter == "p":
        if isinstance(x, np.ndarray) and not x.flags.c_contiguous:
            raise TypeError(f"{what} is not in C order")
        if isinstance(x, np.ndarray):
            return ctypes.c_void_p(x.ctypes.data)
        if x is None or isinstance(x, ctypes.c_void_p):
            return ctypes.c_void_p(value)
    elif letter == "f":
        if isinstance(value, int | float | np.floating):
            return ctypes.c_float(value)
    elif isinstance(value, int | np.integer) and CTYPES[letter](int(value)).value == value:
        return CTYPES[letter](int(value))
    raise TypeError(f"{what} is {WORDS[letter]}, not {x!r:.100}")
