"""What a CUDA device is asked to do, counted as `device.py` counts it on the emulated one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from emulated.device import Events
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class CudaListener:
    """Counts where the host waits for a CUDA device, by PyTorch's warnings, and the kernels it launches."""

    @contextmanager
    def during(self) -> Iterator[Events]:
        """The events of a block; filled at its end."""
        events = Events()
        with (
            profile(activities=[ProfilerActivity.CUDA]) as profiler,
            warnings.catch_warnings(record=True) as seen,
        ):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield events
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for warning in seen:
            if "synchronizing CUDA operation" in str(warning.message):
                line = f"{Path(warning.filename).name}:{warning.lineno}"
                events["synchronize", "CUDA", line] += 1
        for event in profiler.events() or ():
            if event.device_type == DeviceType.CUDA:
                events["operator", event.name, ""] += 1
