"""``kdfast distill``: from a recipe to a trained student."""
