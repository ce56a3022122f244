"""The embedded default: the pocket model's facts, corpus, tokenizer, probe and task worlds."""
