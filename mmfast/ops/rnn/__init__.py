"""Recurrent layers: a whole sequence, every layer's both directions, as one op."""
