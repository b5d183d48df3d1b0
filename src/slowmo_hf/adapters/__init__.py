"""What users hold: Trainer's callback, the optimizer of custom loops, and their checkpoints."""
