"""The device `emu` of `device.cpp` in this process, and a count of what happened on it.

A process has one such device and keeps it, so this is for a process of its own.
"""

import ctypes
import sys
import threading
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

HERE = Path(__file__).parent
NUM_DEVICES = 2
WAITS = ("item", "shape", "to host", "from host", "synchronize")
"""Kinds of events for which a CUDA host waits until its device has done what was queued before."""


class Events(Counter):
    """How often each (kind, what, line of code) happened."""

    def waits(self) -> int:
        """How often the host waited."""
        return sum(number for (kind, _, _), number in self.items() if kind in WAITS)

    def operators(self) -> int:
        """How many operators ran on the device."""
        return sum(number for (kind, _, _), number in self.items() if kind == "operator")

    def by_line(self) -> dict[str, int]:
        """How often the host waited, by kind and line, most first."""
        lines = Counter()
        for (kind, what, line), number in self.items():
            if kind in WAITS:
                lines[f"{kind} ({what}) at {line}"] += number
        return dict(lines.most_common())


def calling_line() -> str:
    """The innermost line outside of torch, and the package's own line that led to it."""
    frame = sys._getframe()
    innermost = ""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if "torch" not in file.parts and file.name != Path(__file__).name:
            line = f"{file.parent.name}/{file.name}:{frame.f_lineno}"
            if "oprd_nb" in file.parts:
                return f"{line}, through {innermost}" if innermost else line
            innermost = innermost or line
        frame = frame.f_back
    return innermost or "the backward pass"


class Listener:
    """Collects the events of the device, on whichever thread they happen."""

    def __init__(self):
        self.events = Events()
        self.lock = threading.Lock()

    def hear(self, kind: bytes, what: bytes) -> None:
        """One event."""
        event = (kind.decode(), what.decode(), calling_line())
        with self.lock:
            self.events[event] += 1

    @contextmanager
    def during(self) -> Iterator[Events]:
        """The events of a block; filled at its end."""
        before = Counter(self.events)
        events = Events()
        yield events
        events.update(Counter(self.events) - before)


def _index(device: int | str | torch.device | None) -> int:
    if device is None or isinstance(device, int):
        return device or 0
    return torch.device(device).index or 0


def _module(library: ctypes.CDLL) -> types.ModuleType:
    """What PyTorch, accelerate and transformers expect to find as `torch.emu`."""

    class Device:
        """The current device, for the time of a block."""

        def __init__(self, device):
            self.index = _index(device)

        def __enter__(self):
            self.before = library.emu_current_device()
            library.emu_set_device(self.index)

        def __exit__(self, *_):
            library.emu_set_device(self.before)

    def manual_seed(seed: int) -> None:
        library.emu_seed(ctypes.c_uint64(int(seed) % 2**64))

    def get_rng_state(device="emu"):
        return torch.ops.emu.get_rng_state(_index(device))

    def set_rng_state(state, device="emu"):
        torch.ops.emu.set_rng_state(state, _index(device))

    def set_rng_state_all(states):
        for device, state in enumerate(states):
            set_rng_state(state, device)

    module = types.ModuleType("torch.emu")
    module.device = module._DeviceGuard = Device
    module.is_available = module.is_initialized = lambda: True
    module.is_bf16_supported = lambda *_, **__: True
    module._is_in_bad_fork = lambda: False
    module._lazy_init = lambda: None
    module.device_count = lambda: NUM_DEVICES
    module.current_device = library.emu_current_device
    module.set_device = lambda device: library.emu_set_device(_index(device))
    module.synchronize = lambda device=None: library.emu_synchronize()
    module.empty_cache = lambda: None
    module.manual_seed = module.manual_seed_all = manual_seed
    module.get_rng_state = get_rng_state
    module.set_rng_state = set_rng_state
    module.get_rng_state_all = lambda: [get_rng_state(device) for device in range(NUM_DEVICES)]
    module.set_rng_state_all = set_rng_state_all
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    # No memory of its own that could be counted.
    module.memory_allocated = module.max_memory_allocated = lambda device=None: 0
    module.reset_peak_memory_stats = lambda device=None: None
    module.get_device_name = lambda device=None: "emulated accelerator"
    return module


def claim_bfloat16() -> None:
    """Let transformers train in bfloat16 here: it asks CUDA and a few others by name and refuses the rest."""
    import transformers.training_args

    transformers.training_args.is_torch_bf16_gpu_available = lambda *_, **__: True


def start(build: Path) -> Listener:
    """Compile the device into the folder `build`, unless it is there, and register it as `emu`."""
    build.mkdir(parents=True, exist_ok=True)
    flags = ["-O0", "-g0", "-std=c++20"]
    load("emulated", [str(HERE / "device.cpp")], flags, build_directory=str(build), is_python_module=False)
    library = ctypes.CDLL(str(build / "emulated.so"))
    library.emu_register()
    torch.utils.rename_privateuse1_backend("emu")
    torch._register_device_module("emu", _module(library))
    torch.utils.generate_methods_for_privateuse1_backend()
    listener = Listener()
    # Both kept with the device: the library holds the bare address of the function only.
    torch.emu.listener = listener
    listener.callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)(listener.hear)
    library.emu_listen(listener.callback)
    return listener
