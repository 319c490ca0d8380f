"""Layout: where the visual tokens of a batch lie, and the index tables made from that."""
