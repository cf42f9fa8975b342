"""A stand-in for CuPy on a machine without a GPU: the few of its calls that this package uses, on host memory.

Kernels are compiled and run by the emulator, elementwise functions by NumPy. It is as strict as CuPy or stricter: what
CuPy refuses raises here too (the sources are those of CuPy 14.2), and what is not used in this package does not exist.

    arrays   NumPy cannot touch them implicitly; asarray uploads, .get() downloads. Fresh memory holds NaNs
    memory   every array lives in a Memory that an allocator returned: cuda.set_allocator
    streams  work on a stream that captures is recorded, not done: its results are NaNs until the graph is launched
    graphs   keep addresses, not arrays: launching one after its memory was freed raises FreedMemory
"""

import ctypes
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from deltanet_ref.backends.cuda.emulator.build import compile

POISON = 0xFF  # all bytes of fresh memory: a NaN in every floating-point type, -1 in integers
ALIGNMENT = 512  # of memory, as that of CuPy's pool


class CaptureError(RuntimeError):
    """What CUDA refuses while a stream captures (cudaErrorStreamCaptureUnsupported)."""


class FreedMemory(RuntimeError):
    """A launched graph uses memory that has been freed since its capture."""


# ---- memory


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


class Memory:
    """A block of device memory."""

    blocks: "weakref.WeakSet[Memory]" = weakref.WeakSet()  # those that exist
    total = 1 << 40  # bytes of memory of the device
    poisoned = True  # False: fresh memory is not written, so that the system need not provide it

    def __init__(self, size: int):
        if size > self.free():
            raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes")
        raw = np.empty(size + ALIGNMENT, np.uint8)
        if self.poisoned:
            raw.fill(POISON)
        start = -raw.ctypes.data % ALIGNMENT
        self.size, self.bytes = size, raw[start : start + size]
        self.ptr = self.bytes.ctypes.data
        Memory.blocks.add(self)

    @classmethod
    def free(cls) -> int:
        """Bytes that are not used."""
        return cls.total - sum(block.size for block in cls.blocks) if cls.total < 1 << 40 else cls.total

    @classmethod
    def at(cls, ptr: int, size: int) -> "Memory":
        """The block that has these bytes; raises FreedMemory if there is none."""
        for block in cls.blocks:
            if block.ptr <= ptr and ptr + size <= block.ptr + block.size:
                return block
        raise FreedMemory(f"no memory of the device has the {size} bytes from {ptr:#x}")


class ForeignMemory:
    """Bytes of a Memory that malloc_func returned; free_func gets their address when no array needs them any more."""

    def __init__(self, size: int, malloc_func, free_func):
        self.size, self.ptr = size, malloc_func(size, 0) if size else 0
        self.block = Memory.at(self.ptr, size) if size else Memory(0)
        start = self.ptr - self.block.ptr if size else 0
        self.bytes = self.block.bytes[start : start + size]
        self.ptr = self.ptr or self.block.ptr
        if size:
            weakref.finalize(self, free_func, self.ptr, 0).atexit = False


class MemoryPointer:
    """A place in a Memory, which it keeps alive."""

    def __init__(self, mem: Memory, offset: int):
        self.mem, self.ptr = mem, mem.ptr + offset

    def __add__(self, offset):
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def __int__(self):
        return self.ptr


def alloc(size: int) -> MemoryPointer:
    """Fresh memory: the default allocator."""
    return MemoryPointer(Memory(size), 0)


class PythonFunctionAllocator:
    """An allocator made of malloc_func(size, device) -> address and free_func(address, device)."""

    def __init__(self, malloc_func, free_func):
        self.malloc_func, self.free_func = malloc_func, free_func

    def malloc(self, size: int) -> MemoryPointer:
        """The allocator."""
        return MemoryPointer(ForeignMemory(size, self.malloc_func, self.free_func), 0)


_allocator = alloc


def set_allocator(allocator=None) -> None:
    """Allocate through allocator(size) -> MemoryPointer from now on; None: alloc."""
    global _allocator
    _allocator = allocator or alloc


def get_allocator():
    """The function that allocates now."""
    return _allocator


@contextmanager
def using_allocator(allocator=None):
    """set_allocator inside the with block."""
    before = get_allocator()
    set_allocator(allocator)
    try:
        yield
    finally:
        set_allocator(before)


# ---- streams and graphs


class Graph:
    """Work that a stream captured."""

    def __init__(self):
        self.work = []  # (function, weak references to the memory that it uses)

    def launch(self, stream=None) -> None:
        """Do the work. The arrays must still exist: the graph does not keep them."""
        if _capturing() is not None:
            raise CaptureError("a graph is launched on a stream that captures")
        for function, memory in self.work:
            if any(reference() is None for reference in memory):
                raise FreedMemory(
                    "the graph uses memory that was freed after its capture: keep its arrays, or an arena"
                )
            function()

    def upload(self, stream=None) -> None:
        """Nothing to do."""


class Stream:
    """A stream; all work on it is done at once, or recorded while it captures."""

    current: "list[Stream]" = []

    def __init__(self, null=False, non_blocking=False):
        self.null, self.non_blocking, self.graph = null, non_blocking, None
        self.ptr = 0 if null else id(self)

    def __enter__(self):
        Stream.current.append(self)
        return self

    def __exit__(self, *error):
        Stream.current.pop()

    def begin_capture(self, mode=None) -> None:
        """Record from now on."""
        if self.null:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if not self.non_blocking:
            raise CaptureError("a blocking stream cannot capture while the default stream is used: non_blocking=True")
        if self.graph is not None:
            raise CaptureError("the stream captures already")
        self.graph = Graph()

    def end_capture(self) -> Graph:
        """The Graph of what was recorded."""
        if self.graph is None:
            raise RuntimeError("the stream does not capture")
        graph, self.graph = self.graph, None
        return graph

    def is_capturing(self) -> bool:
        """Whether work is recorded."""
        return self.graph is not None

    def synchronize(self) -> None:
        """Nothing waits here; refused while the stream captures."""
        self._refuse("synchronize")

    def _refuse(self, what):
        if self.graph is not None:
            raise CaptureError(f"{what} while the stream captures")


Stream.null = Stream(null=True)


def get_current_stream() -> Stream:
    """The innermost stream of with blocks."""
    return Stream.current[-1] if Stream.current else Stream.null


def _capturing():
    return get_current_stream().graph


def _refuse_in_capture(what):
    """Raise CaptureError where CUDA would: reading results, and uploading from memory that is not pinned."""
    get_current_stream()._refuse(what)


def _submit(function, arrays):
    """Do the work now, or record it. arrays: the device arrays that it reads and writes."""
    _submit_on(function, [x._mem for x in arrays])


def _submit_on(function, memory):
    graph = _capturing()
    if graph is None:
        function()
    else:
        graph.work.append((function, [weakref.ref(getattr(block, "block", block)) for block in memory]))


# ---- kernels


class RawModule:
    """A CUDA source, compiled by the emulator. Options other than -I and -D are for NVRTC and not read."""

    def __init__(self, *, code: str, options: tuple = (), backend="nvrtc"):
        include_dirs = [option[2:] for option in options if option.startswith("-I")]
        macros = dict(option[2:].partition("=")[::2] for option in options if option.startswith("-D"))
        self.library = compile(code, include_dirs, macros)
        self.functions = {}

    def get_function(self, name: str) -> "RawKernel":
        """The entry point of this name; always the same one, since its attributes belong to the compiled function."""
        return self.functions.setdefault(name, RawKernel(self.library, name))


class RawKernel:
    """An entry point."""

    def __init__(self, library, name):
        self.library, self.name = library, name
        self.max_dynamic_shared_size_bytes = 48 * 1024

    def __call__(self, grid: tuple, block: tuple, args: tuple, *, shared_mem: int = 0):
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError(
                f"{self.name} is launched with {shared_mem} bytes of shared memory, it may use "
                f"{self.max_dynamic_shared_size_bytes}: set max_dynamic_shared_size_bytes"
            )
        values = [_argument(x) for x in args]
        _submit(lambda: self.library.launch(self.name, grid, block, values, shared_mem), _device_arrays(*args))


SCALARS = {np.int32: ctypes.c_int, np.int64: ctypes.c_longlong, np.float32: ctypes.c_float}


def _argument(x):
    if isinstance(x, ndarray):
        return x._host
    if x is None:
        return None
    if type(x) not in SCALARS:  # a Python int would be passed as int64, a float as float64
        raise TypeError(f"a kernel argument is {type(x).__name__}: use np.int32, np.int64 or np.float32")
    return SCALARS[type(x)](x.item())


# ---- arrays


class Flags(SimpleNamespace):
    """c_contiguous, f_contiguous, owndata."""


class ndarray:
    """An array in device memory. NumPy functions on it, and implicit conversions, raise TypeError.

    data.ptr is the address of its first element, data.mem the Memory that it keeps alive.
    """

    __array_ufunc__ = None  # NumPy's operators give up, and ours are called
    __hash__ = None

    def __init__(self, host: np.ndarray, mem: Memory):
        """host: the array as NumPy sees it, in the bytes of mem."""
        self._host, self._mem = host, mem

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array "
            "explicitly."
        )

    def __array_function__(self, function, types, args, options):
        raise TypeError(f"np.{function.__name__} is called with a device array")

    shape, dtype, ndim, size, nbytes, itemsize, strides = (
        property(lambda self, name=name: getattr(self._host, name))
        for name in ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides")
    )

    @property
    def data(self):
        """MemoryPointer of the first element."""
        return MemoryPointer(self._mem, self._host.ctypes.data - self._mem.ptr)

    @property
    def flags(self):
        """Whether the array is in C or Fortran order."""
        return Flags(c_contiguous=self._host.flags.c_contiguous, f_contiguous=self._host.flags.f_contiguous)

    # ---- to and from the host

    def get(self) -> np.ndarray:
        """A copy on the host."""
        _refuse_in_capture("a device array is read")
        return self._host.copy()

    def set(self, host: np.ndarray) -> None:
        """Overwrite all elements with an array of the host."""
        _refuse_in_capture("an array of the host is copied to the device")
        if not isinstance(host, np.ndarray) or host.dtype != self.dtype or host.shape != self.shape:
            raise TypeError(f"a NumPy array {self.dtype} {self.shape} is needed")
        self._host[...] = host

    def item(self):
        """The only element, as a Python number."""
        return self.get().item()

    def __float__(self):
        return float(self.get())

    def __int__(self):
        return int(self.get())

    def __bool__(self):
        return bool(self.get())

    def __len__(self):
        return len(self._host)

    def __repr__(self):
        return f"<device array {self.dtype} {self.shape}>"

    # ---- views

    @property
    def T(self):
        """The transposed array, a view."""
        return ndarray(self._host.T, self._mem)

    def transpose(self, *axes):
        """The axes in another order, a view."""
        return ndarray(self._host.transpose(*axes), self._mem)

    def reshape(self, *shape):
        """A view, or a copy where a view cannot have this shape."""
        shaped = self._host.reshape(*shape)
        if shaped.size == 0 or np.shares_memory(shaped, self._host):
            return ndarray(shaped, self._mem)
        return ascontiguousarray(self).reshape(*shape)

    def view(self, dtype):
        """The same bytes in another dtype."""
        return ndarray(self._host.view(dtype), self._mem)

    def __getitem__(self, index):
        index = _unwrapped_index(index)
        if _is_basic(index):
            return ndarray(self._host[index], self._mem)
        return _computed(lambda a: a[index], self)

    def __setitem__(self, index, value):
        index = _unwrapped_index(index)
        _check_operands(self, value)

        def write():
            self._host[index] = _host(value)

        _submit(write, [self, *_device_arrays(value)])

    # ---- computing

    def astype(self, dtype, copy=True):
        """The array in another dtype; itself if copy is False and it has that dtype already."""
        if not copy and self.dtype == dtype:
            return self
        return _computed(lambda a: a.astype(dtype), self)

    def copy(self):
        """A copy in C order."""
        return _computed(lambda a: np.array(a, order="C"), self)

    def fill(self, value):
        """Set all elements to a number."""
        self[...] = value

    def sum(self, axis=None, dtype=None, keepdims=False):
        """The sum; bfloat16 is accumulated in float32."""
        wide = np.float32 if dtype is None and self.dtype.name == "bfloat16" else dtype
        return _computed(
            lambda a: np.asarray(a.sum(axis, wide, keepdims=keepdims)).astype(dtype or a.dtype, copy=False), self
        )

    def all(self):
        """Whether all elements are true, as an array without axes."""
        return _computed(lambda a: np.asarray(a.all()), self)

    def __neg__(self):
        return _computed(np.negative, self)


def _operator(name, reflected=False):
    ufunc = getattr(np, name)

    def operate(self, other):
        _check_operands(self, other)
        return _computed(ufunc, other, self) if reflected else _computed(ufunc, self, other)

    return operate


def _in_place(name):
    ufunc = getattr(np, name)

    def operate(self, other):
        _check_operands(self, other)
        _submit(lambda: ufunc(self._host, _host(other), out=self._host, casting="same_kind"), [
            self, *_device_arrays(other)])  # fmt: skip
        return self

    return operate


for _name, _ufunc in dict(add="add", sub="subtract", mul="multiply", truediv="divide").items():
    setattr(ndarray, f"__{_name}__", _operator(_ufunc))
    setattr(ndarray, f"__r{_name}__", _operator(_ufunc, reflected=True))
    setattr(ndarray, f"__i{_name}__", _in_place(_ufunc))
for _name, _ufunc in dict(lt="less", le="less_equal", gt="greater", ge="greater_equal", eq="equal",
                          ne="not_equal").items():  # fmt: skip
    setattr(ndarray, f"__{_name}__", _operator(_ufunc))


def _matmul(a, b):
    """a @ b as CuPy does it: by its cuBLAS handle, which a capturing stream refuses."""
    if a.dtype.name == b.dtype.name == "bfloat16" and max(a.ndim, b.ndim) > 2:
        raise TypeError("CuPy 14.2 multiplies bfloat16 arrays of more than two axes wrongly: reshape them to two")
    if _capturing() is not None:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    _check_operands(a, b)
    return _computed(lambda a, b: np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype)
                     if a.dtype.name == "bfloat16" else np.matmul(a, b), a, b)  # fmt: skip


ndarray.__matmul__ = _matmul


def _computed(function, *operands):
    """A new array with function(operands). The function is also called while the stream captures, for the shape and
    dtype of the result alone."""
    with np.errstate(all="ignore"):
        result = np.asarray(function(*map(_host, operands)))
    out = empty(result.shape, result.dtype)
    if result.flags.f_contiguous and not result.flags.c_contiguous:  # CuPy keeps the order of the operands
        out = empty(result.shape[::-1], result.dtype).T
    if _capturing() is None:
        out._host[...] = result
        return out

    def again():
        out_host[...] = function(*hosts)

    out_host, hosts = out._host, [_host(x) for x in operands]
    _submit(again, [out, *_device_arrays(*operands)])
    return out


def _check_operands(*operands):
    """What CuPy refuses in one operation: arrays of the host, and bfloat16 together with float16."""
    for x in operands:
        if isinstance(x, np.ndarray | list | tuple):
            raise TypeError(f"Unsupported type {type(x)}: an array of the host meets one of the device")
    dtypes = {x.dtype.name for x in operands if isinstance(x, ndarray)}
    if dtypes >= {"bfloat16", "float16"}:
        raise TypeError("bfloat16 and float16 have no common dtype")


def _host(x):
    return x._host if isinstance(x, ndarray) else x


def _device_arrays(*operands):
    return [x for x in operands if isinstance(x, ndarray)]


def _unwrapped_index(index):
    if isinstance(index, tuple):
        return tuple(map(_unwrapped_index, index))
    if isinstance(index, ndarray | np.ndarray | list):
        _refuse_in_capture("an array is indexed by an array")
    return _host(index)


def _is_basic(index):
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, int | np.integer | slice | None.__class__ | type(...)) for part in parts)


# ---- functions


def empty(shape, dtype=np.float64) -> ndarray:
    """An array in memory from the current allocator."""
    shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    dtype = np.dtype(dtype)
    place = _allocator(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    return ndarray(np.ndarray(shape, dtype, place.mem.bytes, place.ptr - place.mem.ptr), place.mem)


def empty_like(x, dtype=None) -> ndarray:
    """empty with the shape and dtype of x."""
    return empty(x.shape, dtype or x.dtype)


def zeros(shape, dtype=np.float64) -> ndarray:
    """An array of zeros."""
    out = empty(shape, dtype)
    out.fill(0)
    return out


def zeros_like(x, dtype=None) -> ndarray:
    """zeros with the shape and dtype of x."""
    return zeros(x.shape, dtype or x.dtype)


def asarray(x, dtype=None) -> ndarray:
    """x on the device: itself, in another dtype, or uploaded from the host."""
    if isinstance(x, ndarray):
        return x if dtype is None or x.dtype == dtype else x.astype(dtype)
    host = np.asarray(x, dtype)
    _refuse_in_capture("an array of the host is copied to the device")
    out = empty(host.shape, host.dtype)
    out._host[...] = host
    return out


array = asarray


def ascontiguousarray(x) -> ndarray:
    """x in C order: itself or a copy."""
    return x if x.flags.c_contiguous else x.copy()


def asnumpy(x) -> np.ndarray:
    """A copy on the host."""
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


def concatenate(arrays, axis=0) -> ndarray:
    """The arrays one after the other along an axis."""
    arrays = list(arrays)
    _check_operands(*arrays)
    if len(arrays) > 8:
        _refuse_in_capture("more than 8 arrays are concatenated, for which CuPy uploads a table of addresses,")
    return _computed(lambda *parts: np.concatenate(parts, axis), *arrays)


def _as_strided(x, shape, strides) -> ndarray:
    """A view with this shape and these strides in bytes, as CuPy's; it must lie in the memory of x."""
    view = np.lib.stride_tricks.as_strided(x._host, shape, strides)
    low, high = np.lib.array_utils.byte_bounds(view)
    if low < x._mem.ptr or high > x._mem.ptr + x._mem.size:
        raise ValueError(f"a view {shape} with strides {strides} leaves the memory of its array")
    return ndarray(view, x._mem)


lib = SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=_as_strided))


def _elementwise(name):
    ufunc = getattr(np, name)

    def function(x: ndarray) -> ndarray:
        if not isinstance(x, ndarray):
            raise TypeError(f"{name} is called with {type(x).__name__}, not with a device array")
        return _computed(ufunc, x)

    function.__name__ = function.__qualname__ = name
    return function


log, exp, sqrt, square, isfinite = map(_elementwise, ("log", "exp", "sqrt", "square", "isfinite"))


# ---- cuBLAS


class Cublas:
    """What is used of libcublas, on host memory: the calls, their order and their addresses are checked."""

    def __init__(self):
        self.stream, self.workspace, self.handles = 0, None, 0

    def cublasCreate_v2(self, handle):
        """A handle on the null stream, without a workspace of ours."""
        _refuse_in_capture("cublasCreate")
        self.handles += 1
        handle._obj.value = self.handles
        return 0

    def cublasSetStream_v2(self, handle, stream):
        """Resets the workspace."""
        self.stream, self.workspace = stream.value or 0, None
        return 0

    def cublasSetWorkspace_v2(self, handle, place, size):
        """Memory of ours for the products of this stream."""
        self.workspace = Memory.at(place.value, size.value)
        return 0

    def cublasGemmEx(self, handle, op_a, op_b, m, n, k, alpha, A, a_type, lda, B, b_type, ldb, beta, C, c_type, ldc,
                     compute, algorithm):  # fmt: skip
        """C = alpha op(A) op(B) + beta C, all matrices stored by columns; accumulated in float32, rounded once."""
        if self.stream != get_current_stream().ptr:
            raise RuntimeError("a product is queued on a stream that is not the current one")
        if _capturing() is not None and self.workspace is None:
            raise CaptureError("cuBLAS allocates its workspace while the stream captures")
        m, n, k, alpha, beta = m.value, n.value, k.value, alpha._obj.value, beta._obj.value
        a, a_memory = _columns(A, a_type, lda, (k, m) if op_a.value else (m, k))
        b, b_memory = _columns(B, b_type, ldb, (n, k) if op_b.value else (k, n))
        c, c_memory = _columns(C, c_type, ldc, (m, n))
        a, b = a.T if op_a.value else a, b.T if op_b.value else b

        def multiply():
            product = np.float32(alpha) * (a.astype(np.float32, copy=False) @ b.astype(np.float32, copy=False))
            c[...] = product + np.float32(beta) * c.astype(np.float32, copy=False) if beta else product

        _submit_on(multiply, [a_memory, b_memory, c_memory])
        return 0


def _columns(ptr, cuda_type, stride, shape):
    """The matrix of this shape, columns `stride` elements apart, as a NumPy view; and its Memory."""
    if stride.value < max(1, shape[0]):
        raise ValueError(f"columns of {shape[0]} elements are {stride.value} apart")
    dtype = np.dtype(np.float32 if cuda_type.value == 0 else _bfloat16())
    extent = (shape[1] - 1) * stride.value + shape[0] if 0 not in shape else 0
    memory = Memory.at(ptr.value, extent * dtype.itemsize)
    strides = dtype.itemsize, stride.value * dtype.itemsize
    return np.ndarray(shape, dtype, memory.bytes, ptr.value - memory.ptr, strides), memory


def _bfloat16():
    import ml_dtypes

    return ml_dtypes.bfloat16


cublas = Cublas()


def get_default_memory_pool():
    """There is none: memory is freed at once, and what is held now stands for the most that was."""
    return SimpleNamespace(free_all_blocks=lambda: None, total_bytes=lambda: sum(block.size for block in Memory.blocks))


def Device():
    """The current device: one of Hopper's."""
    return SimpleNamespace(attributes={"MaxSharedMemoryPerBlockOptin": 227 << 10})


cuda = SimpleNamespace(
    Device=Device,
    runtime=SimpleNamespace(memGetInfo=lambda: (Memory.free(), Memory.total)),
    Memory=Memory,
    MemoryPointer=MemoryPointer,
    Stream=Stream,
    Graph=Graph,
    alloc=alloc,
    PythonFunctionAllocator=PythonFunctionAllocator,
    set_allocator=set_allocator,
    get_allocator=get_allocator,
    using_allocator=using_allocator,
    get_current_stream=get_current_stream,
)
