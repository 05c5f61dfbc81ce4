"""A small diffusion model, trained: the generator of the demo, and a way to have one offline."""
