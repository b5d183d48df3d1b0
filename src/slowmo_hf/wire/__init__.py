"""What travels between processes, and how it becomes sums."""
