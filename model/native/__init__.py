"""Compiled code for CPUs: the target's pass and the draft's step as one call each. Optional: without it, torch runs."""
