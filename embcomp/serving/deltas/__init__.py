"""What changed from one artefact to the next, as one small file, and the next one made of it."""
