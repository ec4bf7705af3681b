"""A model ready to answer: what evaluation, serving and tools share."""
