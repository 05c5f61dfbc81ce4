"""The commands, a file each. Imports of the work itself stay inside them, so that ``kdfast --help`` is quick."""
