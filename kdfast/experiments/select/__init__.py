"""``kdfast select``: from many images those that cover a teacher's classes evenly."""
