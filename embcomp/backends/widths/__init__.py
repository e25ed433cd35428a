"""Widths and rows searched on a supernet: OptEmbed, Matryoshka."""
