"""Many runs from one file, and tables over them; nothing here imports torch, so that the commands start at once."""
