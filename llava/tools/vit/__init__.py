"""Parts of the commands that convert, upload and verify HEVC-ViT encoders."""
