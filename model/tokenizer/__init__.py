"""Item embeddings -> codebooks -> semantic IDs -> catalog. Used by training only."""
