"""What the HEVC-ViT encoders are held against, and how: cases, published facts, sides, a table of checks."""
