"""The recipes: one flat YAML file an experiment, installed as ``kdfast.recipes``."""
