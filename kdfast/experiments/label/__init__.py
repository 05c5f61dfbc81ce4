"""``kdfast label``: a teacher's outputs for a set of images, stored for students to learn from."""
