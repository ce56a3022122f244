"""Base models, tokenizers and the loss."""
