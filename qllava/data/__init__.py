"""From files on disk to tensors: formats -> Example -> encode -> Sample -> collate -> batch."""
