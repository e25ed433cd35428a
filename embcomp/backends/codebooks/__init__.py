"""Codebooks: ids become codes, or latents, into shared codewords and projections."""
