"""Benchmarks of the model half: every speed claim has its command here."""
