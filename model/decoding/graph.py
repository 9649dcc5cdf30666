"""Programs: device programs by key, recorded once as CUDA graphs, replayed ever after.

A program is a function over tensors that stay where they are: it reads and writes them, allocates only what it forgets,
and asks the device nothing. The first time a key is asked for, its program runs as it is, on the stream it will be
recorded on (libraries set themselves up in that run), and is recorded after that; every later time the recording is
replayed. All recordings share one memory pool: only one runs at a time, and none leaves anything in the pool.

After `freeze` there is no first time any more: a key nobody asked for before is refused with `UnknownProgram` and
counted, never run some slower way unseen. Without `capture` (a CPU, or to compare) programs run as they are, frozen all
the same. Knows nothing of what the programs do.
"""

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch


class UnknownProgram(RuntimeError):
    """A program that was not made before the freeze; the message names its key."""


class Programs:
    """Programs of one device. Not thread-safe: one thread calls it."""

    def __init__(self, device: torch.device, *, capture: bool) -> None:
        self.device, self.frozen, self.refused = device, False, 0
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._stream = torch.cuda.Stream(device) if capture else None
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    @property
    def keys(self) -> list[Hashable]:
        """What was made so far."""
        return list(self._graphs)

    @property
    def num_captured(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def freeze(self) -> None:
        self.frozen = True

    def run(self, key: Hashable, program: Callable[[], None]) -> None:
        """Run the `program` of a key; it must be the same function of the same tensors each time. Raises
        UnknownProgram."""
        if key not in self._graphs:
            self._first_run(key, program)
            return
        graph = self._graphs[key]
        if graph is None:
            program()
        else:
            graph.replay()

    def _first_run(self, key: Hashable, program: Callable[[], None]) -> None:
        if self.frozen:
            self.refused += 1
            raise UnknownProgram(f"no program was made for {key} before the freeze")
        if self._stream is None:
            program()
            self._graphs[key] = None
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            program()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Recording runs nothing, so the state moves on once. Other threads may use the device meanwhile.
        with (
            _nothing_collected(),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            program()
        self._graphs[key] = graph


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage collection: a recording that happens to be garbage must not be destroyed while another is made."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
