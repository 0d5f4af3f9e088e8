"""One training run: its description, its folder, its training and its measures."""
