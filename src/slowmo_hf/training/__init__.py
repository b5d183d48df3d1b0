"""Local training and its rounds."""
