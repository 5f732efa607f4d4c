"""Data sets in, sharded and preprocessed batches out: readers, decoding, preprocessing; NumPy and Pillow, never
torch."""
