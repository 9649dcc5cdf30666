"""The API process: item IDs in, item IDs out. Stateless, and free of torch and `model`."""
