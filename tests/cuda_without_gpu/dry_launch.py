"""Launches without a GPU: Triton's own binder, specialisation, cache and ptxas run, and the launch does nothing.

The driver is one that only knows the architecture. Tensors lie on the CPU, and nothing reads them.
"""

from collections import Counter
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from torchrec_qr.ops.triton_kernels import launcher
from torchrec_qr.ops.triton_kernels.device_tables import WIDEST_READ


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        names = ("sm_clock_rate", "mem_clock_rate", "mem_bus_width")
        most = {"max_shared_mem": 163 << 10, "multiprocessor_count": 108, "warpSize": 32, "max_num_regs": 1 << 16}
        return most | dict.fromkeys(names, 1)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 0, 0, 32, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: int) -> None:
        pass


class _Driver:
    """Its current device is numbered by its architecture, so that Triton keeps the kernels of each apart."""

    utils = _Utils()

    def __init__(self, dry: "DryLaunches") -> None:
        self._dry = dry

    def get_current_device(self) -> int:
        return self._dry.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._dry.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None

    @classmethod
    def is_active(cls) -> bool:
        return True


class _Bound:
    """A kernel whose arguments have been bound, and which is not compiled."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        pass

    def run(self, *args: Any) -> None:
        pass


class _NothingKept(dict[Any, Any]):
    """Leaves every launch to Triton, so that it is counted, and would be compiled anew where Triton finds a reason."""

    def __setitem__(self, form: Any, compiled: Any) -> None:
        pass


class DryLaunches:
    """Installs itself for the rest of the process; counts launches and compilations by kernel.

    Attributes:
        architecture: for which kernels are compiled, 90 for sm_90.
        only_bound: whether compilations are counted and left out.
    """

    def __init__(self) -> None:
        self.architecture, self.only_bound = 90, False
        self.launches: Counter[str] = Counter()
        self.compilations: Counter[str] = Counter()
        driver.set_active(_Driver(self))
        launcher._compiled = _NothingKept()
        run, do_compile = JITFunction.run, JITFunction._do_compile

        def counted_run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            self.launches[kernel.fn.__name__] += 1
            if not all(type(size) is int for size in grid):
                raise AssertionError(f"{kernel.fn.__name__}: a grid of {grid}; allowed: integers of the host")
            for name, given in zip(kernel.arg_names, args, strict=False):
                is_own = isinstance(given, torch.Tensor) and name not in launcher._FROM_CALLERS
                if is_own and given.data_ptr() % WIDEST_READ:
                    raise AssertionError(
                        f"{kernel.fn.__name__}: {name} at {given.data_ptr():#x}; allowed: multiples of 16"
                    )
            return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        def counted_compilation(kernel: Any, key: Any, signature: Any, device: int, *args: Any, **kwargs: Any) -> Any:
            self.compilations[kernel.fn.__name__] += 1
            if self.only_bound:
                return kernel.device_caches[device][0].setdefault(key, _Bound())
            return do_compile(kernel, key, signature, device, *args, **kwargs)

        JITFunction.run, JITFunction._do_compile = counted_run, counted_compilation
