"""The worker process: semantic IDs in, semantic IDs out. The one place where sockets and tensors meet."""
