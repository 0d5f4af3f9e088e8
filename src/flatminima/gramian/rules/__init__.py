"""How one use of a parameter turns (input, output gradient) into its rows of J; one file a family of layers."""
