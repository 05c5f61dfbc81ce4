"""``kdfast eval``: how good a saved network is."""
