"""Images from programs: shaders.py, leaves.py, and the arithmetic that every backend rounds alike."""
