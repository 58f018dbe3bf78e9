"""Data, from files on disk to tensors: formats -> Example -> encode -> Sample -> collate -> batch."""
