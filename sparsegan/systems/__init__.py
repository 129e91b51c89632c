"""Whole systems, from images to a fast generator: what `sparsegan train RECIPE` runs."""

from sparsegan.systems.recipes import RECIPES, Recipe, Settings
from sparsegan.systems.run import interpolation, run_system

__all__ = ["RECIPES", "Recipe", "Settings", "interpolation", "run_system"]
