"""Logs -> histories -> splits -> token batches. Used by training and evaluation, never by serving."""
