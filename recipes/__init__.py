"""The recipes: one YAML file a table or figure of a paper, installed as ``kdfast.recipes``."""
