"""Megatron-Core on CPU + gloo: the one module that adapts the engine, inert where CUDA is available.

Megatron-Core names CUDA in many places (`device="cuda"`, `torch.cuda.current_device()`, streams, the CUDA
random generator) and has no hook for another device. `adapt_megatron_core_to_cpu` installs an import hook:
every module of `megatron.core` sees, under its global name `torch`, a stand-in that answers those calls for
the CPU and passes everything else on to the real torch. Nothing else in the process is touched: the real
`torch`, and so transformers' `from_pretrained`, stay as they are. Two tensor methods that Megatron-Core
calls on tensors (`.cuda()`, `.type()`) are wrapped, and answer differently to Megatron-Core's modules only.

`torch.cuda.is_available()` is never faked. With a newer Megatron-Core, check `_MODULE_EDITS` first: it holds
every place that depends on the engine's internals; names that differ between versions are in `compat.py`.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib.machinery
import importlib.util
import logging
import queue
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from megatron_cpt.runtime.compat import TRITON_MODULES, WRITE_RESULTS_QUEUES, engine_version
from megatron_cpt.runtime.cpu_kernels import swiglu

_ENGINE = "megatron.core"
_FACTORIES = (
    "tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn",
    "empty_like", "zeros_like", "ones_like", "full_like",
)  # fmt: skip


def adapt_megatron_core_to_cpu() -> bool:
    """Make `import megatron.core` work without CUDA; return whether anything was adapted.

    Call it before the first import of Megatron-Core; further calls do nothing.

    Raises:
        LaunchError: Megatron-Core is missing, twice there, or of a version that the project is not proven with.
    """
    engine_version()
    if torch.cuda.is_available():
        return False
    if any(isinstance(finder, _EngineFinder) for finder in sys.meta_path):
        return True
    early = [name for name in sys.modules if _is_engine(name)]
    assert not early, f"{early[0]} was imported before it could be adapted to the CPU"
    sys.meta_path.insert(0, _EngineFinder())
    torch.Tensor.cuda = _tensor_cuda(torch.Tensor.cuda)  # type: ignore[method-assign]
    torch.Tensor.type = _tensor_type(torch.Tensor.type)  # type: ignore[method-assign]
    return True


def _is_engine(module_name: str) -> bool:
    return module_name == _ENGINE or module_name.startswith(_ENGINE + ".")


class _EngineFinder:
    """Finds Megatron-Core's modules as Python does, and loads them through `_EngineLoader`."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_engine(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _EngineLoader(fullname, spec.loader.path)
        return spec


class _EngineLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ in TRITON_MODULES and importlib.util.find_spec("triton") is None:
            module.__dict__["__builtins__"] = vars(builtins) | {"__import__": _import_without_triton}
        super().exec_module(module)
        if module.__dict__.get("torch") is torch:
            module.torch = _TORCH_ON_CPU  # type: ignore[attr-defined]
        if edit := _MODULE_EDITS.get(module.__name__):
            edit(module)


class _StandIn(ModuleType):
    """A module that answers some names itself and passes all others on to the module it stands for."""

    def __init__(self, real: ModuleType, **names: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(names)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _Stream:
    """Accepts every call of torch.cuda.Stream and torch.cuda.Event; on a CPU everything is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None: ...


@contextlib.contextmanager
def _null_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


_device: ContextVar[str] = ContextVar("device", default="cpu")  # what stands for the GPU


@contextlib.contextmanager
def engine_on_meta() -> Iterator[None]:
    """Within it Megatron-Core makes its tensors on the meta device: shapes without memory, for the dry run."""
    token = _device.set("meta")
    try:
        yield
    finally:
        _device.reset(token)


def _current_device(*args: Any) -> torch.device:
    return torch.device(_device.get())


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory` with `device="cuda"` read as the device that stands for it, where memory is not pinned either."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _device.get()
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _called_by_engine() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(_ENGINE + ".")


def _tensor_cuda(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(real)
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to(_device.get()) if _called_by_engine() else real(self, *args, **kwargs)

    return cuda


def _tensor_type(real: Callable[..., Any]) -> Callable[..., Any]:
    """The optimizer sorts parameters by `param.type() == "torch.cuda.FloatTensor"`."""

    @functools.wraps(real)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        if not args and not kwargs and _called_by_engine():
            return result.replace("torch.", "torch.cuda.", 1).replace(".meta.", ".", 1)
        return result

    return type_


_NVTX = _StandIn(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing, mark=_nothing)
_CUDA_ON_CPU = _StandIn(
    torch.cuda,
    current_device=_current_device,
    synchronize=_nothing,
    empty_cache=_nothing,
    Stream=_Stream,
    Event=_Stream,
    current_stream=_Stream,
    default_stream=_Stream,
    stream=_null_context,
    get_rng_state=_get_rng_state,
    set_rng_state=_set_rng_state,
    manual_seed=torch.manual_seed,
    nvtx=_NVTX,
)
_TORCH_ON_CPU = _StandIn(torch, cuda=_CUDA_ON_CPU, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


def _do_not_compile(jit: ModuleType) -> None:
    """torch.compile would build each small fused function with the C++ compiler, half a minute in all."""
    jit.jit_fuser = jit.noop_decorator  # type: ignore[attr-defined]


def _track_cpu_generator(random: ModuleType) -> None:
    """The tracker that keeps tensor-parallel randomness apart drives the CPU's generator."""
    random._get_cuda_rng_state = _get_rng_state  # type: ignore[attr-defined]
    random._set_cuda_rng_state = _set_rng_state  # type: ignore[attr-defined]
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in str(record.msg))


def _keep_results_in_process(writer: ModuleType) -> None:
    """A save's results come from a thread here; a server process for them would keep a copy of the rank's memory."""

    @functools.cache
    def results(*args: Any) -> Any:
        return queue.Queue()

    for name in WRITE_RESULTS_QUEUES:
        if hasattr(writer, name):
            setattr(writer, name, results)


def _skip_exchange_of_one(buffers: ModuleType) -> None:
    """A reduce-scatter or all-gather among one rank is nothing to NCCL; gloo copies it all, twice, at every step."""
    buffers.dist_reduce_scatter_func = _unless_alone(buffers.dist_reduce_scatter_func)  # type: ignore[attr-defined]
    buffers.dist_all_gather_func = _unless_alone(buffers.dist_all_gather_func)  # type: ignore[attr-defined]


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def among(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if group is None or group.size() > 1:
            return collective(output, input, *args, group=group, **kwargs)
        if output.data_ptr() != input.data_ptr():
            output.copy_(input)
        return _Stream() if kwargs.get("async_op") else None  # whoever waits for it need not

    return among


def _import_without_triton(name: str, *args: Any, **kwargs: Any) -> ModuleType:
    """`__import__` of a module of GPU kernels where triton, which would compile them, is not installed."""
    return _NO_TRITON if name.partition(".")[0] == "triton" else builtins.__import__(name, *args, **kwargs)


_NO_TRITON = ModuleType("triton")
_NO_TRITON.__dict__.update(jit=lambda kernel: kernel, language=types.SimpleNamespace(constexpr=None))


def _keep_only_the_input_of_swiglu(fusions: ModuleType) -> None:
    """Megatron-Core's fused SwiGLU is compiled for a GPU; uncompiled it makes a pass and a tensor of each operation."""

    def gated(x: torch.Tensor, bias: torch.Tensor | None, *of_a_gpu: Any) -> torch.Tensor:
        return swiglu(x if bias is None else x + bias)

    fusions.bias_swiglu_impl = gated  # type: ignore[attr-defined]


_MODULE_EDITS: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.jit": _do_not_compile,
    "megatron.core.tensor_parallel.random": _track_cpu_generator,
    "megatron.core.fusions.fused_bias_swiglu": _keep_only_the_input_of_swiglu,
    "megatron.core.dist_checkpointing.strategies.filesystem_async": _keep_results_in_process,
    "megatron.core.distributed.param_and_grad_buffer": _skip_exchange_of_one,
}
