"""Where and when: Ray, stages, workers, checkpoints, the command line."""
