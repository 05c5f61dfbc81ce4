"""The five methods."""
