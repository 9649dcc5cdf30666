"""Other engines on the same target and the same requests, each in an environment of its own."""
