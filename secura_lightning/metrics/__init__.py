"""Metrics over the accuracy matrix (numpy) and over predicted text."""
