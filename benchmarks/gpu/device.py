"""What is measured on: the GPU, or in a rehearsal the CPU, which stands in for its clock, streams and graphs.

Everything that only CUDA has is behind this one class, so that a rehearsal runs all other lines of the parts.
"""

from __future__ import annotations

import contextlib
import gc
import resource
from collections.abc import Callable, Iterator

import torch

from hf_sai.runs.meters import Stopwatch

__all__ = ["Device"]


class Device:
    """One GPU, or the CPU.

    Args:
        rehearse: Take the CPU.

    Raises:
        SystemExit: There is no GPU.
    """

    def __init__(self, rehearse: bool) -> None:
        if not rehearse and not torch.cuda.is_available():
            raise SystemExit("There is no CUDA device here. --rehearse runs everything in tiny sizes on the CPU.")
        self.cuda = not rehearse
        self.torch = torch.device("cuda", 0) if self.cuda else torch.device("cpu")

    def wait(self) -> None:
        """Until everything that was started is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], object]) -> Stopwatch:
        """Start work between two events; the watch knows the seconds after :meth:`wait`."""
        watch = Stopwatch(self.torch)
        watch.start()
        work()
        watch.stop()
        return watch

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of some work by itself."""
        self.wait()
        watch = self.timed(work)
        self.wait()
        return watch.seconds()

    # --- memory

    def free(self) -> None:
        """Give back what nobody holds any more."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """What can still be allocated; in a rehearsal one MiB, so that models stay tiny."""
        self.free()
        return torch.cuda.mem_get_info()[0] if self.cuda else 2**20

    def allocated(self) -> int:
        """Bytes of all tensors that stand now."""
        return torch.cuda.memory_allocated() if self.cuda else self.peak()

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """The most bytes that tensors took since :meth:`reset_peak`; the process's largest size on a CPU."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    # --- order

    @contextlib.contextmanager
    def nothing_waits(self) -> Iterator[None]:
        """An error for whatever makes the host wait for the device."""
        before = torch.cuda.get_sync_debug_mode() if self.cuda else 0
        if self.cuda:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.cuda:
                torch.cuda.set_sync_debug_mode(before)

    @contextlib.contextmanager
    def stream(self) -> Iterator[Callable[[], None]]:
        """Do this on a stream of its own; what it gives lets the present stream wait for that one."""
        if not self.cuda:
            yield lambda: None
            return
        present, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(present)
        with torch.cuda.stream(other):
            yield lambda: present.wait_stream(other)

    def captured(self, work: Callable[[], object]) -> Callable[[], object]:
        """Some work as a CUDA graph, to be replayed; in a rehearsal the work itself. Capturing does not do it."""
        if not self.cuda:
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay
