"""``kdfast export``: a trained network as a file that runs without kdfast."""
