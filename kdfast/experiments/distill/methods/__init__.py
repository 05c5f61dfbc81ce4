"""The methods that a recipe can name: each one's keys, and what builds it from them."""
