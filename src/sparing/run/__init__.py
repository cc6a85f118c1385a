"""Recipes, training loop and run directories. Requires the extra `sparing[train]`."""
