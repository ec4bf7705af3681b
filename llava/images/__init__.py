"""Pictures and clips: their geometry, reading them from disk, and turning them into pixels for a tower."""
