"""Rows, tasks, encoding and batches."""
