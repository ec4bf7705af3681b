"""The parts of `llava.train.train_toconv`, which trains a token compressor (ToConv) on images alone."""
