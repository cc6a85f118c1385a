"""Recipes, the training loop and the run directory. Needs the extra `sparing[train]`."""
