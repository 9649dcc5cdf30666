"""The tensors: semantic IDs, item trie, target, draft, decoding and training.

Knows nothing of sockets or of `service`.
"""
