"""What several commands read: recipes, result directories, images in batches, and sets as a teacher sees them."""
