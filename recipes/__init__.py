"""Training scripts to read and change; what several of them use stands in `recipes.common`."""
