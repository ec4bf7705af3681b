"""Pictures and clips: their geometry, reading them from disk, and turning them into pixels for a tower."""

# endings of picture files, wherever a folder is looked through or a path must tell by itself what it is
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
