"""The sockets: API process, worker process, command line. Knows no tensors outside `service.worker`."""

__version__ = "0.1.0"
