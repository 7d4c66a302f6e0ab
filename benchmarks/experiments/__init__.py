"""What methods do to a model: losses, end tasks, how far protected heads move."""
