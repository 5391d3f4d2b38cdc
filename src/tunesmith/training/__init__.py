"""Training: the one loop, optimizer and schedule, checkpoints, meter, trackers."""
