"""From a table or a search to recipes, and from a recipe to stages with fingerprints. Without Ray."""
