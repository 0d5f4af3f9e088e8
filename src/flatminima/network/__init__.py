"""What is done to a model and its data from outside."""
