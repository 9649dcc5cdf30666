"""List decoding: the slow twin, draft trees, verification, and the decoder that runs rounds over rows."""
