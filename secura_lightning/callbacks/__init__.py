"""What runs beside the training: task hooks, measuring forgetting, checkpoints, the progress bar."""
