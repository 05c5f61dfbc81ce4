"""The ``kdfast`` command."""
