"""Scoring a model: generation, multiple choice by likelihood, perplexity."""
