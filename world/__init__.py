"""world: procedural pictures, clips, programs and sums with exact answers. No torch, no downloads."""
